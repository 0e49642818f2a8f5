"""Layer 3: `nnx.*` transforms, all on one mechanism, `lift`."""

"""Layer 5: what trains a model."""

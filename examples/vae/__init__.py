"""Handwritten digits from a plane, by a variational autoencoder: `python -m examples.vae`."""

"""Layers made of layers: one after the other, around a sum, in a scan, and the transformer."""

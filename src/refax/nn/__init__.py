"""Layers: Modules, and functions without state, that models are built of."""

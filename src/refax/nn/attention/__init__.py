"""Attention, its masks and positions, and the memory of keys and values for decoding."""

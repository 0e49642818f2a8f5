"""Convolution and pooling: layers whose window slides over spatial axes."""

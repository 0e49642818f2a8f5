"""Read handwritten digits with a small convolutional network: `python -m examples.digits`."""

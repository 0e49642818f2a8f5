"""Make handwritten digits out of noise, by flow matching: `python -m examples.diffusion`."""

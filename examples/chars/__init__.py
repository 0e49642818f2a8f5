"""Write text one character at a time, with a small transformer: `python -m examples.chars`."""

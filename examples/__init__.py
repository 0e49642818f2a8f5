"""Programs that show Refax at work: `python -m examples.<name>`, from the repository's root."""

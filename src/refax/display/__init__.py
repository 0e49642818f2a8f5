"""What a model looks like: as a tree in a notebook, and as a page that stands alone."""

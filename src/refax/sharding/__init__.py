"""Where the parts of a model lie on a mesh: annotations, plans, placement."""

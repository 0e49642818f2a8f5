"""Layer 1: Variables, Pytrees and Modules, and the traversal that flattens them."""

"""Linear maps, products in Einstein's notation, and tables of vectors."""

"""Examples, datasets, and the toy world."""

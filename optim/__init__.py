"""How weights move: optimizers that are their papers, grouping, averaging, wrappers."""

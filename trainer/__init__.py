"""How one group of workers trains one recipe."""

"""What does each optimizer do? One file for each, its paper's lines and nothing else; the registry finds them."""

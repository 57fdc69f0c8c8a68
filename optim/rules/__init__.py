"""What does each optimizer do? One file for each, its paper's lines alone; the registry finds them."""

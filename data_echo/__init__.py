"""How examples arrive: sources, the order, the preprocessing pool, the echo buffer."""

"""One file per optimizer: its paper's lines and nothing else. Each is in the registry by itself."""

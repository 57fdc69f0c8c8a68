"""One file per optimizer: its paper's lines and nothing else. Every `Rule` defined here is in the registry."""

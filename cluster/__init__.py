"""How machines run recipes: the command line, the launchers, jobs on a Ray cluster."""

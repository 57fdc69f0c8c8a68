"""Tasks that ship with Lockstep, each a model, its data and its loss."""

"""Which tasks ship with Lockstep? Each is a model, its data and its loss."""

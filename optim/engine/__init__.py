"""How are rules run: whole tensors, blocks of rows, compiled rows? Authors of optimizers never open this."""

"""Which example, and which copy of it, is served when? Arithmetic on one integer; no data is read."""

"""Which example is served when, and which copy of it? Arithmetic on one integer; no data is touched."""

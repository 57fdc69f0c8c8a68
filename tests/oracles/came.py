"""CAME in float64 NumPy. Luo et al. 2023, arXiv:2307.02047, Algorithm 2."""

import numpy as np

from tests.oracles import each_tensor, rms

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"betas": (0.5, 0.9, 0.95), "eps": (1e-4, 1e-2), "clip_threshold": 0.3},
]


def lines(p):
    """The dimensions of rows and of columns: the two largest, of equal sizes the later ones."""
    order = sorted(range(p.ndim), key=lambda d: (p.shape[d], d))
    return tuple(sorted(order[-2:]))


def came_start(p, **_):
    if p.ndim < 2:
        return {"m": np.zeros_like(p), "v": np.zeros_like(p)}
    rows, columns = lines(p)
    of_rows = np.zeros([1 if d == columns else n for d, n in enumerate(p.shape)])
    of_columns = np.zeros([1 if d == rows else n for d, n in enumerate(p.shape)])
    return {
        "m": np.zeros_like(p),
        "r": of_rows,
        "c": of_columns,
        "rs": of_rows.copy(),
        "cs": of_columns.copy(),
    }


def came_step(
    x,
    g,
    s,
    lr,
    t,
    betas=(0.9, 0.999, 0.9999),
    eps=(1e-30, 1e-16),
    clip_threshold=1.0,
    weight_decay=0.0,
    **_,
):
    b1, b2, b3 = betas

    def followed(row, column, values, beta):
        """Move both averages, and give the matrix that they stand for."""
        rows, columns = lines(x)
        s[row] = beta * s[row] + (1 - beta) * values.mean(columns, keepdims=True)
        s[column] = beta * s[column] + (1 - beta) * values.mean(rows, keepdims=True)
        return s[row] * s[column] / s[row].mean(rows, keepdims=True)

    squares = g**2 + eps[0]
    if x.ndim < 2:
        v = s["v"] = b2 * s["v"] + (1 - b2) * squares
    else:
        v = followed("r", "c", squares, b2)
    u = g / np.sqrt(v)
    u = u / max(1.0, rms(u) / clip_threshold)
    s["m"] = b1 * s["m"] + (1 - b1) * u
    step = s["m"]
    if x.ndim >= 2:
        step = step / np.sqrt(followed("rs", "cs", (u - s["m"]) ** 2 + eps[1], b3))
    return x - lr * weight_decay * x - lr * step


oracle = each_tensor(came_step, came_start)

"""Schedule-free SGD in float64 NumPy. Defazio et al. 2024, arXiv:2405.15682, Algorithm 1 with its warm-up."""

import numpy as np


def schedule_free(start, gradients_by_step, rates, momentum=0.9, weight_decay=0.0):
    """The three sequences y, x, z after all steps."""
    x, z = [p.copy() for p in start], [p.copy() for p in start]
    squares = np.maximum.accumulate(rates) ** 2
    for t, (gradients, rate) in enumerate(zip(gradients_by_step, rates, strict=True)):
        for i, g in enumerate(gradients):
            y = (1 - momentum) * z[i] + momentum * x[i]
            z[i] = z[i] - rate * (g + weight_decay * y)
            c = squares[t] / squares[: t + 1].sum() if squares[t] else 0.0
            x[i] = (1 - c) * x[i] + c * z[i]
    y = [(1 - momentum) * b + momentum * a for a, b in zip(x, z, strict=True)]
    return y, x, z

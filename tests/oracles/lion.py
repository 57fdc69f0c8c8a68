"""Lion in float64 NumPy. Chen et al. 2023, arXiv:2302.06675, Algorithm 2."""

import numpy as np

from tests.oracles import each_tensor, zeros

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"betas": (0.5, 0.9)},
    {"cautious": True, "weight_decay": 0.1},
]


def lion_step(theta, g, s, lr, t, betas=(0.9, 0.99), weight_decay=0.0, cautious=False, **_):
    b1, b2 = betas
    c = b1 * s["m"] + (1 - b1) * g
    update = np.sign(c)
    if cautious:
        aligned = update * g > 0
        update = update * aligned * theta.size / (np.count_nonzero(aligned) + 1)
    new = theta - lr * (update + weight_decay * theta)
    s["m"] = b2 * s["m"] + (1 - b2) * g
    return new


oracle = each_tensor(lion_step, zeros("m"))

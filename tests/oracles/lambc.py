"""LAMBC in float64 NumPy. Fong, Chen, Chen 2020, arXiv:2011.13584."""

import numpy as np

from tests.oracles import each_tensor, norm, zeros

OPTIONS = [{}, {"weight_decay": 0.0}, {"betas": (0.5, 0.9), "eps": 1e-3}]


def lambc_step(x, g, s, lr, t, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, **_):
    b1, b2 = betas
    s["m"] = b1 * s["m"] + (1 - b1) * g
    s["v"] = b2 * s["v"] + (1 - b2) * g**2
    u = (s["m"] / (1 - b1**t)) / (np.sqrt(s["v"] / (1 - b2**t)) + eps) + weight_decay * x
    ratio = norm(x) / norm(u) if norm(x) > 0 and norm(u) > 0 else 1.0
    return x - lr * np.clip(ratio, 0.0, 1.0) * u


oracle = each_tensor(lambc_step, zeros("m", "v"))

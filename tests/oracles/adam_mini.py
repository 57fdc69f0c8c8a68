"""Adam-mini in float64 NumPy. Zhang et al. 2024, arXiv:2406.16793, a block for each output neuron."""

import numpy as np

from tests.oracles import each_tensor

OPTIONS = [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-3}]


def adam_mini_start(p, **_):
    state = {"m": np.zeros_like(p)}
    return state | ({"v": np.zeros_like(p)} if p.ndim < 2 else {"r": np.zeros((len(p), *[1] * (p.ndim - 1)))})


def adam_mini_step(x, g, s, lr, t, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
    b1, b2 = betas
    s["m"] = b1 * s["m"] + (1 - b1) * g
    if x.ndim < 2:
        second = s["v"] = b2 * s["v"] + (1 - b2) * g**2
    else:
        for neuron in range(len(x)):
            s["r"][neuron] = b2 * s["r"][neuron] + (1 - b2) * np.mean(g[neuron] ** 2)
        second = s["r"]
    return x - lr * weight_decay * x - lr * (s["m"] / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + eps)


oracle = each_tensor(adam_mini_step, adam_mini_start)

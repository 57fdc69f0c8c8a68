"""Amos in float64 NumPy. Tian, Parikh 2022, arXiv:2210.11693, Algorithm 1."""

import math

import numpy as np

from tests.oracles import each_tensor

OPTIONS = [
    {},
    {"eta": 0.3},
    {"momentum": 0.9},
    {"beta": 0.9, "c_coef": 0.5, "d_coef": 2.0, "extra_l2": 0.1},
]


def amos_start(p, momentum=0.0, **_):
    return {"v": np.zeros(()), "b": np.zeros(())} | ({"m": np.zeros_like(p)} if momentum else {})


def amos_step(
    theta, g, s, lr, t, eta=1.0, beta=0.999, momentum=0.0, c_coef=0.25, d_coef=0.25, extra_l2=0.0, **_
):
    xi = lr
    mean_square = float((g**2).mean())
    s["v"] = np.asarray(beta * s["v"] + (1 - beta) * mean_square)
    rsqrt_v2 = (1 - beta**t) / max(float(s["v"]), 2.0**-125)
    b = float(s["b"])
    c = 1 / math.sqrt(1 + c_coef * math.sqrt(xi) * b)
    gamma = c * xi**2 * rsqrt_v2 * mean_square
    d = 1 / (1 + d_coef * math.sqrt(xi * eta) * b)
    delta = d * (xi * eta * math.sqrt(rsqrt_v2) * g + (gamma / 2 + extra_l2) * theta)
    if momentum:
        delta = s["m"] = momentum * s["m"] + (1 - momentum) * delta
    s["b"] = np.asarray(b + gamma * (1 + b))
    return theta - delta


oracle = each_tensor(amos_step, amos_start)

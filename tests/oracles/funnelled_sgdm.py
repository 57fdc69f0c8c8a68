"""Funnelled SGD with momentum in float64 NumPy. Amid, Anil, Fifty, Warmuth 2022, arXiv:2202.00145."""

import math

import numpy as np

from tests.oracles import norm

LOG_TEN = math.log(10)
OPTIONS = [
    {},
    {"gain_rate": 0.1, "scale_rate": 0.05, "weight_decay": 0.1},
    {"gain_rate": 5.0, "scale_rate": 5.0, "max_log_gain": 0.5, "max_log_scale": 0.3},
    {"scale_rate": 0.05, "global_scale": False},
    {"gain_rate": 0.1, "scale_rate": 0.1, "normalize_alignment": True, "beta": 0.5, "momentum": 0.8},
]


def funnelled_sgdm(
    parameters,
    gradients_by_step,
    rates,
    momentum=0.9,
    beta=0.9,
    gain_rate=1e-3,
    scale_rate=1e-3,
    weight_decay=0.0,
    global_scale=True,
    normalize_alignment=False,
    max_log_gain=LOG_TEN,
    max_log_scale=LOG_TEN,
):
    x = [p.copy() for p in parameters]
    states = [
        {"log_p": np.zeros_like(p), "m": np.zeros_like(p), "u": np.zeros_like(p), "log_s": np.zeros(())}
        for p in x
    ]
    for gradients, lr in zip(gradients_by_step, rates, strict=True):
        gradients = [g + weight_decay * w for g, w in zip(gradients, x, strict=True)]
        everything = [range(len(x))] * len(x) if global_scale else [[i] for i in range(len(x))]
        scales = []
        for i, members in enumerate(everything):
            alignment = sum(float((states[j]["u"] * gradients[j]).sum()) for j in members)
            if normalize_alignment:
                u_norm = math.sqrt(sum(norm(states[j]["u"]) ** 2 for j in members))
                g_norm = math.sqrt(sum(norm(gradients[j]) ** 2 for j in members))
                alignment = alignment / (u_norm * g_norm) if u_norm * g_norm > 0 else 0.0
            log_s = float(states[i]["log_s"]) + scale_rate * alignment
            scales.append(min(max(log_s, -max_log_scale), max_log_scale))
        for i, g in enumerate(gradients):
            s = states[i]
            s["log_s"] = np.asarray(scales[i])
            along = np.sign(s["m"] * g) if normalize_alignment else s["m"] * g
            s["log_p"] = np.clip(s["log_p"] + gain_rate * along, -max_log_gain, max_log_gain)
            s["m"] = beta * s["m"] + (1 - beta) * g
            s["u"] = momentum * s["u"] + lr * np.exp(s["log_p"]) * g
            x[i] = x[i] - math.exp(scales[i]) * s["u"]
    return x, states


oracle = funnelled_sgdm

"""LAMB in float64 NumPy. You et al. 2019, arXiv:1904.00962, Algorithm 2."""

import math

import numpy as np

from tests.oracles import norm

OPTIONS = [
    {},
    {"weight_decay": 0.0},
    {"bias_correction": False},
    {"grad_averaging": False},
    {"max_grad_norm": 0.5},
    {"trust_clip": True},
    {"always_adapt": False, "weight_decay": 0.0},
    {"decoupled_decay": True, "weight_decay": 0.1},
    {"betas": (0.8, 0.95), "eps": 1e-3},
    {"cautious": True, "max_grad_norm": 0.5},
]


def lamb(
    parameters,
    gradients_by_step,
    rates,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.01,
    bias_correction=True,
    grad_averaging=True,
    max_grad_norm=None,
    trust_clip=False,
    always_adapt=True,
    decoupled_decay=False,
    cautious=False,
    adapt=True,
):
    b1, b2 = betas
    x = [p.copy() for p in parameters]
    states = [{"m": np.zeros_like(p), "v": np.zeros_like(p)} for p in parameters]
    for t, (gradients, lr) in enumerate(zip(gradients_by_step, rates, strict=True), start=1):
        if max_grad_norm:
            total = math.sqrt(sum(norm(g) ** 2 for g in gradients))
            gradients = [g / max(1.0, total / max_grad_norm) for g in gradients]
        for i, g in enumerate(gradients):
            s = states[i]
            s["m"] = b1 * s["m"] + ((1 - b1) if grad_averaging else 1) * g
            s["v"] = b2 * s["v"] + (1 - b2) * g**2
            mhat, vhat = s["m"], s["v"]
            if bias_correction:
                mhat, vhat = mhat / (1 - b1**t), vhat / (1 - b2**t)
            r = mhat / (np.sqrt(vhat) + eps)
            if cautious:
                aligned = r * g > 0
                r = np.where(aligned, r * r.size / (aligned.sum() + 1), 0.0)
            update = r if decoupled_decay else r + weight_decay * x[i]
            ratio = 1.0
            if adapt and (always_adapt or weight_decay) and norm(x[i]) > 0 and norm(update) > 0:
                ratio = norm(x[i]) / norm(update)
            if trust_clip:
                ratio = min(ratio, 1.0)
            decay = lr * weight_decay * x[i] if decoupled_decay else 0.0
            x[i] = x[i] - lr * ratio * update - decay
    return x, states


oracle = lamb

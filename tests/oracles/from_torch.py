"""The optimizers that come from torch, in float64 NumPy, by their published rules in torch's form.

One function each; `ORACLES[name]` is called as the oracles of our own rules are, `OPTIONS[name]` lists the
settings.
"""

import math

import numpy as np

from tests.oracles import each_tensor, zeros


def sgd(w, g, s, lr, t, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    d = g + weight_decay * w
    if momentum == 0:
        return w - lr * d
    s["momentum_buffer"] = d if t == 1 else momentum * s["momentum_buffer"] + (1 - dampening) * d
    return w - lr * (d + momentum * s["momentum_buffer"] if nesterov else s["momentum_buffer"])


def momentum(w, g, s, lr, t, momentum=0.9, **options):
    return sgd(w, g, s, lr, t, momentum=momentum, **options)


def nag(w, g, s, lr, t, momentum=0.9, **options):
    return sgd(w, g, s, lr, t, momentum=momentum, nesterov=True, **options)


def rprop(w, g, s, lr, t, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0)):
    """iRprop-: where the sign turned, the step shrinks and the coordinate rests."""
    if t == 1:
        s["step_size"] = np.full_like(w, lr)
    agreement = g * s["prev"]
    factor = np.where(agreement > 0, etas[1], np.where(agreement < 0, etas[0], 1.0))
    s["step_size"] = np.clip(s["step_size"] * factor, *step_sizes)
    g = np.where(agreement < 0, 0.0, g)
    s["prev"] = g
    return w - s["step_size"] * np.sign(g)


def adagrad(w, g, s, lr, t, lr_decay=0.0, weight_decay=0.0, eps=1e-10):
    g = g + weight_decay * w
    s["sum"] = s["sum"] + g**2
    return w - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(s["sum"]) + eps)


def rmsprop(w, g, s, lr, t, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
    g = g + weight_decay * w
    s["square_avg"] = alpha * s["square_avg"] + (1 - alpha) * g**2
    variance = s["square_avg"]
    if centered:
        s["grad_avg"] = alpha * s["grad_avg"] + (1 - alpha) * g
        variance = variance - s["grad_avg"] ** 2
    u = g / (np.sqrt(variance) + eps)
    if momentum:
        u = s["momentum_buffer"] = momentum * s["momentum_buffer"] + u
    return w - lr * u


def adadelta(w, g, s, lr, t, rho=0.9, eps=1e-6, weight_decay=0.0):
    g = g + weight_decay * w
    s["square_avg"] = rho * s["square_avg"] + (1 - rho) * g**2
    d = np.sqrt(s["acc_delta"] + eps) / np.sqrt(s["square_avg"] + eps) * g
    s["acc_delta"] = rho * s["acc_delta"] + (1 - rho) * d**2
    return w - lr * d


def _moments(s, g, betas):
    s["exp_avg"] = betas[0] * s["exp_avg"] + (1 - betas[0]) * g
    s["exp_avg_sq"] = betas[1] * s["exp_avg_sq"] + (1 - betas[1]) * g**2
    return s["exp_avg"], s["exp_avg_sq"]


def adam(w, g, s, lr, t, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    m, v = _moments(s, g + weight_decay * w, betas)
    return w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def adamw(w, g, s, lr, t, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    return adam(w, g, s, lr, t, betas, eps) - lr * weight_decay * w


def amsgrad(w, g, s, lr, t, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Torch's and Keras's reading: the maximum is of v before its bias correction, and is corrected
    afterwards."""
    m, v = _moments(s, g + weight_decay * w, betas)
    s["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], v)
    return w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(s["max_exp_avg_sq"] / (1 - betas[1] ** t)) + eps)


def adamax(w, g, s, lr, t, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    g = g + weight_decay * w
    s["exp_avg"] = betas[0] * s["exp_avg"] + (1 - betas[0]) * g
    s["exp_inf"] = np.maximum(betas[1] * s["exp_inf"], np.abs(g) + eps)
    return w - lr / (1 - betas[0] ** t) * s["exp_avg"] / s["exp_inf"]


def nadam(w, g, s, lr, t, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3):
    def mu(k):
        return betas[0] * (1 - 0.5 * 0.96 ** (k * momentum_decay))

    m, v = _moments(s, g + weight_decay * w, betas)
    product = math.prod(mu(k) for k in range(1, t + 1))
    mhat = mu(t + 1) * m / (1 - product * mu(t + 1)) + (1 - mu(t)) * (g + weight_decay * w) / (1 - product)
    return w - lr * mhat / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def radam(w, g, s, lr, t, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Rectified where the variance is tractable (torch: rho > 5), else momentum; eps beside the root of the
    raw v."""
    m, v = _moments(s, g + weight_decay * w, betas)
    mhat = m / (1 - betas[0] ** t)
    rho_inf = 2 / (1 - betas[1]) - 1
    rho = rho_inf - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
    if rho <= 5:
        return w - lr * mhat
    r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    return w - lr * r * mhat * math.sqrt(1 - betas[1] ** t) / (np.sqrt(v) + eps)


ORACLES = {
    "sgd": each_tensor(sgd, zeros("momentum_buffer")),
    "momentum": each_tensor(momentum, zeros("momentum_buffer")),
    "nag": each_tensor(nag, zeros("momentum_buffer")),
    "rprop": each_tensor(rprop, zeros("prev", "step_size")),
    "adagrad": each_tensor(adagrad, zeros("sum")),
    "rmsprop": each_tensor(rmsprop, zeros("square_avg", "grad_avg", "momentum_buffer")),
    "adadelta": each_tensor(adadelta, zeros("square_avg", "acc_delta")),
    "adam": each_tensor(adam, zeros("exp_avg", "exp_avg_sq")),
    "adamw": each_tensor(adamw, zeros("exp_avg", "exp_avg_sq")),
    "adamax": each_tensor(adamax, zeros("exp_avg", "exp_inf")),
    "nadam": each_tensor(nadam, zeros("exp_avg", "exp_avg_sq")),
    "amsgrad": each_tensor(amsgrad, zeros("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "radam": each_tensor(radam, zeros("exp_avg", "exp_avg_sq")),
}

OPTIONS = {
    "sgd": [{}, {"weight_decay": 0.1}, {"momentum": 0.5, "dampening": 0.3}],
    "momentum": [{}, {"weight_decay": 0.1}, {"momentum": 0.5, "dampening": 0.5}],
    "nag": [{}, {"weight_decay": 0.1, "momentum": 0.8}],
    "rprop": [{}, {"etas": (0.3, 1.5), "step_sizes": (1e-4, 0.02)}],
    "adagrad": [{}, {"lr_decay": 0.1, "weight_decay": 0.1}],
    "rmsprop": [{}, {"weight_decay": 0.1, "momentum": 0.5}, {"centered": True, "alpha": 0.9}],
    "adadelta": [{}, {"rho": 0.5, "weight_decay": 0.1}],
    "adam": [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-3}],
    "adamw": [{}, {"weight_decay": 0.1}],
    "adamax": [{}, {"weight_decay": 0.1}],
    "nadam": [{}, {"weight_decay": 0.1}],
    "amsgrad": [{}, {"weight_decay": 0.1}],
    "radam": [{}, {"weight_decay": 0.1}],
}

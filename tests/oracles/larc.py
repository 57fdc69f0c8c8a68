"""LARC in float64 NumPy, after apex: a clipped local rate scales what SGD with momentum then takes."""

from tests.oracles import each_tensor, norm, zeros

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"trust_coefficient": 0.001, "momentum": 0.5, "eps": 1e-3},
    {"nesterov": True, "weight_decay": 0.05},
]


def larc_step(
    w, g, s, lr, t, momentum=0.9, weight_decay=0.0, trust_coefficient=0.02, eps=1e-8, nesterov=False, **_
):
    weights, gradients = norm(w), norm(g)
    scale = 1.0
    if weights > 0 and gradients > 0:
        local_rate = trust_coefficient * weights / (gradients + weights * weight_decay + eps)
        scale = min(local_rate / lr, 1.0)
    d = scale * (g + weight_decay * w)
    s["v"] = momentum * s["v"] + d
    return w - lr * (d + momentum * s["v"] if nesterov else s["v"])


oracle = each_tensor(larc_step, zeros("v"))

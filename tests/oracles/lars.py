"""LARS in float64 NumPy. You, Gitman, Ginsburg 2017, arXiv:1708.03888, Algorithm 1."""

from tests.oracles import each_tensor, norm, zeros

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "momentum_mode": "torch"},
    {"nesterov": True, "weight_decay": 0.05},
    {"nesterov": True, "momentum_mode": "torch", "dampening": 0.0},
    {"momentum_mode": "torch", "dampening": 0.3},
    {"trust_clip": True, "trust_coefficient": 0.5},
    {"trust_coefficient": 0.02, "eps": 1e-3, "momentum": 0.5},
    {"always_adapt": False},
]


def lars_step(
    w,
    g,
    s,
    lr,
    t,
    momentum=0.9,
    weight_decay=0.0,
    trust_coefficient=1e-3,
    eps=0.0,
    dampening=0.0,
    nesterov=False,
    momentum_mode="paper",
    trust_clip=False,
    always_adapt=True,
    adapt=True,
):
    local = 1.0
    if adapt and (always_adapt or weight_decay) and norm(w) > 0 and norm(g) > 0:
        local = trust_coefficient * norm(w) / (norm(g) + weight_decay * norm(w) + eps)
        if trust_clip:
            local = min(local / lr, 1.0)
    scaled = local * (g + weight_decay * w)
    damp = 1.0 if t == 1 else 1.0 - dampening
    if momentum_mode == "paper":
        s["v"] = momentum * s["v"] + damp * lr * scaled
        return w - (momentum * s["v"] + lr * scaled if nesterov else s["v"])
    s["v"] = momentum * s["v"] + damp * scaled
    return w - lr * (scaled + momentum * s["v"] if nesterov else s["v"])


oracle = each_tensor(lars_step, zeros("v"))

"""LARC."""

from typing import Literal

from optim.rules.lars import LARS


class LARC(LARS):
    """LARC. NVIDIA's clipped form of LARS (You, Gitman, Ginsburg 2017, arXiv:1708.03888), as in apex.

    Update (norms over one layer, the whole tensor; η = `trust_coefficient`):
        ratio = min(η ‖p‖ / (‖g‖ + λ ‖p‖ + ε) / lr, 1)       1 where a norm is 0
        v = μ v + ratio (g + λ p)
        p = p - lr v

    State: v (like p, fp32): 4 bytes per parameter.
    Defaults: apex's η and ε; lr and μ are those of SGD, which LARC never exceeds.
    Options: those of LARS, of which this is `trust_clip` with `momentum_mode` "torch".
    Deviations of others: apex drops the decay where a norm is 0, and overwrites the gradient; it has left
        apex in 2025.
    Use: as SGD with momentum, at rates that single layers would not bear; batches up to 16384.
    """

    lr: float = 0.1
    trust_coefficient: float = 0.02
    eps: float = 1e-8
    momentum_mode: Literal["paper", "torch"] = "torch"
    trust_clip: bool = True

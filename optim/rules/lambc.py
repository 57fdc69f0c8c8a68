"""LAMBC."""

from optim.rules.lamb import LAMB


class LAMBC(LAMB):
    """LAMBC. Fong, Chen, Chen 2020, arXiv:2011.13584, LAMB with the trust ratio clipped.

    Update (norms over one layer, the whole tensor; u as in LAMB):
        p = p - lr min(‖p‖ / ‖u‖, 1) u                       ratio 1 where either norm is 0

    State: m, v (each like p, fp32): 8 bytes per parameter.
    Defaults: LAMB's; the bound is 1, the paper's best.
    Options: those of LAMB, of which this is `trust_clip`.
    Deviations of others: timm has the same option.
    Use: where LAMB's first steps are too long: large weights, small updates.
    """

    trust_clip: bool = True

"""A passport says what an implementation does: ours, known deviations written here, libraries."""

import pytest
import torch
from torch import nn

import optim
from optim.registry import rules
from tests.optim.witnesses import pytorch_optimizer, timm_optimizer


def found(optimizer, family=None):
    return {aspect: what for aspect, what, _ in optim.passport(optimizer, family).findings}


def ours(name, **options):
    return optim.build(name, [nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))], **options)


@pytest.mark.parametrize("name", ["lars", "lamb", "novograd", "adafactor", "sm3"])
def test_ours_are_the_papers(name):
    kind = rules()[name]
    for each in (kind, f"optim:{kind.__name__}", ours(name, lr=0.1), ours(name, lr=0.1, engine="tensor")):
        passport = optim.passport(each)
        assert passport.is_the_papers, str(passport)
    assert str(passport).splitlines()[0] == f"optim.{kind.__name__}: {name}, the paper's"


OPTIONS = {
    "lamb": [
        ({"bias_correction": False}, {"debiasing in u": "none"}),
        ({"grad_averaging": False}, {"debiasing in u": "m and v, m = β₁ m + g"}),
        ({"decoupled_decay": True}, {"decay": "outside u", "debiasing in u": "cannot be seen"}),
        ({"always_adapt": False}, {"of layers without decay": "1"}),
        ({"trust_clip": True}, {"bound": "ratio ≤ 1"}),
        ({"max_grad_norm": 1.0}, {"clipping": "by the global norm"}),
    ],
    "lars": [
        ({"momentum_mode": "torch"}, {"learning rate": "outside"}),
        ({"always_adapt": False}, {"of layers without decay": "1"}),
        (
            {"trust_clip": True, "momentum_mode": "torch", "trust_coefficient": 0.02},
            {"bound": "lr ratio ≤ lr", "learning rate": "outside"},
        ),
    ],
    "novograd": [
        ({"grad_averaging": True}, {"first step": "v = ‖g‖², averaged", "averages new terms": "all"}),
    ],
    "adafactor": [
        ({"relative_step": True}, {"given a learning rate, takes": "unknown (0.005)"}),
        ({"scale_parameter": False}, {"step is scaled": "not"}),
        ({"beta1": 0.9}, {"momentum": "β₁ = 0.9"}),
        ({"clip_threshold": 1e9}, {"clipping": "none"}),
        ({"min_dim_size_to_factor": 64}, {"factors of (40, 20, 3, 50)": "none"}),
    ],
    "sm3": [({"variant": "I"}, {"variant": "I"}), ({"beta": 0.5}, {"accumulators": "averages"})],
}


@pytest.mark.parametrize(
    ("name", "options", "expected"), [(name, *case) for name, known in OPTIONS.items() for case in known]
)
def test_an_option_shows_as_what_it_is_and_nothing_else_does(name, options, expected):
    passport = optim.passport(ours(name, lr=0.1, **options))
    different = {aspect: what for aspect, what, paper in passport.findings if what != paper}
    assert expected.items() <= different.items()
    if name not in ("sm3",):
        assert different == expected
    assert not passport.is_the_papers


class LambDebiasedLater(torch.optim.Optimizer):
    """As DeepSpeed and ColossalAI: the rate is debiased after the ratio. It overwrites the gradient, too."""

    def __init__(self, params, lr=0.01, betas=(0.9, 0.999), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                s = self.state[p]
                s["t"] = s.get("t", 0) + 1
                s["m"] = b1 * s.get("m", torch.zeros_like(p)) + (1 - b1) * p.grad
                s["v"] = b2 * s.get("v", torch.zeros_like(p)) + (1 - b2) * p.grad**2
                u = s["m"] / (s["v"].sqrt() + 1e-12) + group["weight_decay"] * p
                rate = group["lr"] * (1 - b2 ** s["t"]) ** 0.5 / (1 - b1 ** s["t"])
                p.grad.copy_(u)
                p.sub_(rate * p.norm() / u.norm() * u)


class LarsOfMomentum(torch.optim.Optimizer):
    """LARS as the LAMB paper restates it: the momentum is normalised."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                s, mu = self.state[p], group["momentum"]
                s["m"] = mu * s.get("m", torch.zeros_like(p)) + (1 - mu) * p.grad
                p.sub_(group["lr"] * 0.01 * p.norm() / s["m"].norm().clamp(min=1e-12) * s["m"])


def test_known_deviations_are_named():
    seen = found(LambDebiasedLater)
    assert seen["trust ratio"] == "‖p‖ / ‖u‖, then debiased by √(1 - β₂ᵗ) / (1 - β₁ᵗ)"
    assert seen["gradients"] == "overwritten"
    assert found(LarsOfMomentum)["normalises"] == "the momentum"


def test_the_optimizer_itself_is_left_alone():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = optim.LAMB([p], weight_decay=0.3)
    p.grad = torch.ones(3, 2)
    optimizer.step()
    before = p.detach().clone(), str(optimizer.state_dict())
    optim.passport(optimizer)
    assert torch.equal(p, before[0])
    assert str(optimizer.state_dict()) == before[1]


def test_what_has_no_family_is_refused():
    with pytest.raises(ValueError, match="AdamW is of no family known here; give one of lamb, lars"):
        optim.passport(torch.optim.AdamW)
    with pytest.raises(ValueError, match="'optim:LAMP' is no module:Class that can be imported"):
        optim.passport("optim:LAMP")


def test_torchs_adafactor_is_another_function():
    seen = found("torch.optim:Adafactor")
    assert seen["given a learning rate, takes"] == "min(lr, 1 / √t)"
    assert seen["factors of (40, 20, 3, 50)"] == "the last two"


LIBRARIES = {
    "timm's Lamb": (lambda: timm_optimizer("lamb", "Lamb"), {"of layers without decay": "1"}),
    "timm's Lars": (lambda: timm_optimizer("lars", "Lars"), {"of layers without decay": "1"}),
    "timm's NvNovoGrad": (lambda: timm_optimizer("nvnovograd", "NvNovoGrad"), {}),
    "pytorch_optimizer's Lamb": (lambda: pytorch_optimizer("Lamb"), {"bound": "‖p‖ ≤ 10"}),
    "pytorch_optimizer's LARS": (lambda: pytorch_optimizer("LARS"), {"gradients": "overwritten"}),
    "pytorch_optimizer's SM3": (
        lambda: pytorch_optimizer("SM3"),
        {"state without momentum": "and a buffer like p"},
    ),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_have_the_deviations_that_are_documented(library):
    get, expected = LIBRARIES[library]
    if (kind := get()) is None:
        pytest.skip(f"{library} is not installed")
    assert expected.items() <= found(kind).items()

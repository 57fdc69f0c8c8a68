"""Which variant of a layerwise or memory-light rule an optimizer is, found by watching its steps."""

import copy
import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optim.rule import Rule


class Finding(NamedTuple):
    """One aspect of a rule: what was seen, and what the paper has."""

    aspect: str
    found: str
    paper: str


@dataclass(frozen=True)
class Passport:
    """What `passport` found: `str` of it is a Markdown table."""

    name: str
    family: str
    findings: list[Finding]

    @property
    def is_the_papers(self) -> bool:
        """Whether every aspect is the paper's."""
        return all(found == paper for _, found, paper in self.findings)

    def __str__(self) -> str:
        verdict = "the paper's" if self.is_the_papers else "not the paper's"
        rows = [f"| {aspect} | {found} | {paper} |" for aspect, found, paper in self.findings]
        title = f"{self.name}: {self.family}, {verdict}"
        return "\n".join([title, "", "| aspect | this one | the paper |", "|---|---|---|", *rows])


def passport(optimizer: torch.optim.Optimizer | type | str, family: str | None = None) -> Passport:
    """Say which variant of LARS, LAMB, NovoGrad, Adafactor or SM3 an optimizer is, as it is configured.

    Copies of it take a few steps on small float64 tensors; the optimizer itself is left alone.

    Args:
        optimizer: an optimizer, its class, or "module:Class", which are built with their defaults but for lr.
        family: "lars", "lamb", "novograd", "adafactor" or "sm3"; by default what the class is called.

    Raises:
        ValueError: no family, or no such class.
    """
    if isinstance(optimizer, str):
        optimizer = _imported(optimizer)
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    called = kind.__name__.lower()
    family = family or next(
        (each for each in _PROBES if each in called), "lars" if called == "larc" else None
    )
    if family not in _PROBES:
        raise ValueError(
            f"passport: {kind.__name__} is of no family known here; give one of {', '.join(_PROBES)}"
        )
    template = _built(optimizer) if isinstance(optimizer, type) else optimizer
    module = kind.__module__.partition(".")[0]
    return Passport(f"{module}.{kind.__name__}", family, _PROBES[family](_Subject(template)))


def _imported(path: str) -> type:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"passport: {path!r} is no module:Class that can be imported ({error})") from error


def _built(kind: type) -> torch.optim.Optimizer:
    given = [nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))]
    return kind(given, lr=0.01)  # some have no default, and some of Adafactor's do other things without


class _Subject:
    """An optimizer whose copies take steps on tensors of ours."""

    def __init__(self, template: torch.optim.Optimizer) -> None:
        self._template = template
        self.group = template.param_groups[0]
        self.state: Any = None
        self.keeps_gradients = True

    def steps(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor]],
        options: Sequence[Mapping[str, Any]] | Mapping[str, Any] = (),
        hold: bool = False,
    ) -> list[list[Tensor]]:
        """How far each step moves each of the weights down; with `hold` they are put back after each.

        Options are the group's, at all steps or at each; what the optimizer does not have is left out.
        """
        parameters = [nn.Parameter(w.clone()) for w in weights]
        optimizer = self._copy(parameters)
        moves = []
        for number, now in enumerate(gradients):
            given = options if isinstance(options, Mapping) else (options[number] if options else {})
            optimizer.param_groups[0].update({k: v for k, v in given.items() if k in self.group})
            before = [p.detach().clone() for p in parameters]
            for p, g in zip(parameters, now, strict=True):
                p.grad = g.clone()
            optimizer.step()
            self.keeps_gradients &= all(
                p.grad is not None and torch.equal(p.grad, g) for p, g in zip(parameters, now, strict=True)
            )
            moves.append([old - p.detach() for old, p in zip(before, parameters, strict=True)])
            for p, old in zip(parameters, before, strict=True):
                p.data = old if hold else p.data
        self.state = [optimizer.state[p] for p in parameters]
        return moves

    def _copy(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The same class with the same attributes and options over other parameters, at its beginning."""
        made = object.__new__(type(self._template))
        vars(made).update(vars(self._template))
        group = {k: v for k, v in copy.deepcopy({**self.group, "params": []}).items() if k != "step"}
        made.state, made.param_groups = defaultdict(dict), [group | {"params": parameters}]
        if isinstance(made, Rule):
            made.__setstate__({"_flatten": False})
        return made

    def first(self, w: Tensor, g: Tensor, **options: Any) -> Tensor:
        """The first step on one tensor."""
        return self.steps([w], [[g]], options)[0][0]


def _closest(value: float, candidates: Mapping[str, float], tolerance: float = 0.01) -> str:
    """The candidate that a value is, to 1 %."""
    label, expected = min(candidates.items(), key=lambda item: abs(item[1] - value))
    return (
        label if abs(expected - value) <= tolerance * max(abs(expected), 1e-9) else f"unknown ({value:.3g})"
    )


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _norm(x: Tensor) -> float:
    return float(x.norm())


SOME = 1e-8
"""A decay that only says that there is one."""


def _lamb(it: _Subject) -> list[Finding]:
    b1, b2 = it.group["betas"][:2]
    lr = 0.01
    p, g = 0.5 * _drawn(6, 4), 0.02 * _drawn(6, 4, seed=1)
    paces = {
        "‖p‖ / ‖u‖": 1.0,
        "‖p‖ / ‖u‖, then debiased by √(1 - β₂ᵗ) / (1 - β₁ᵗ)": math.sqrt(1 - b2) / (1 - b1),
        "‖p‖ / ‖u‖, then divided by 1 - β₁ᵗ": 1 / (1 - b1),
    }
    none = {"1": math.sqrt(p.numel()) / _norm(p)}

    def ratio(w: Tensor, decay: float) -> str:
        gradient = g.reshape(-1)[: w.numel()].view(w.shape)
        move = it.first(w, gradient, lr=lr, weight_decay=decay)
        one = {"1": math.sqrt(w.numel()) / _norm(w)}
        return _closest(_norm(move) / (lr * _norm(w)), paces | one)

    findings = [Finding("trust ratio", ratio(p, SOME), "‖p‖ / ‖u‖")]
    findings.append(Finding("of layers without decay", ratio(p, 0.0), "‖p‖ / ‖u‖"))
    findings.append(Finding("of vectors", ratio(p[0], SOME), "‖p‖ / ‖u‖"))
    wide = 1e4 * p
    long = _norm(it.first(wide, g, lr=lr, weight_decay=SOME)) / lr
    slower = next((v for k, v in paces.items() if findings[0].found == k), 1.0)
    bounds = {"none": _norm(wide) * slower, "‖p‖ ≤ 10": 10 * slower, "ratio ≤ 1": none["1"] * _norm(p)}
    bounds["ratio ≤ 10"] = 10 * none["1"] * _norm(p) * slower
    findings.append(Finding("bound", _closest(long, bounds), "none"))
    findings += _decay_of_lamb(it, p, g, lr)
    other = 0.02 * _drawn(3, 3, seed=2)
    moves = [
        it.steps([p, other], [[g, other], [0.1 * g.flip(0), k * other]], {"lr": lr})[1][0] for k in (1, 1e6)
    ]
    clipped = "by the global norm" if (moves[0] - moves[1]).norm() > 1e-3 * moves[0].norm() else "none"
    return [*findings, Finding("clipping", clipped, "none"), _overwrites(it)]


def _decay_of_lamb(it: _Subject, p: Tensor, g: Tensor, lr: float) -> list[Finding]:
    """From one step with decay: what of it goes along sign(g), what along p, what along neither."""
    b1, b2 = it.group["betas"][:2]
    decay = 0.5
    move = it.first(p, g, lr=lr, weight_decay=decay).flatten()
    basis = torch.stack([g.sign().flatten(), p.flatten()], 1)
    along = torch.linalg.lstsq(basis, move[:, None]).solution
    rest = _norm(move[:, None] - basis @ along) / _norm(move)
    of_sign, of_p = (float(x) for x in along.flatten())
    if rest > 0.01:
        placed, scale = "in the gradient", "cannot be seen"
    elif abs(of_p - lr * decay) < 0.01 * lr * decay:
        placed, scale = "outside u", "cannot be seen"
    else:
        placed = "in u"
        scale = _closest(
            of_sign * decay / of_p,
            {
                "m and v": 1.0,
                "m and v, m = β₁ m + g": 1 / (1 - b1),
                "m alone": 1 / math.sqrt(1 - b2),
                "none": (1 - b1) / math.sqrt(1 - b2),
            },
        )
    return [Finding("decay", placed, "in u"), Finding("debiasing in u", scale, "m and v")]


def _lars(it: _Subject) -> list[Finding]:
    lr = 0.1
    p, g = _drawn(6, 4), _drawn(6, 4, seed=1)
    mu, decay = 0.9, 0.5
    many = {"lr": lr, "weight_decay": SOME, "momentum": mu}
    eta = _norm(it.first(p, g, **many)) / (lr * _norm(p))
    unadapted = _norm(g) / _norm(p)
    findings = []
    for aspect, w, weight_decay in (
        ("of layers without decay", p, 0.0),
        ("of vectors", p[0], SOME),
    ):
        of_w = g.reshape(-1)[: w.numel()].view(w.shape)
        seen = _norm(it.first(w, of_w, lr=lr, weight_decay=weight_decay)) / (lr * _norm(w))
        label = _closest(seen, {"as of others": eta, "1": _norm(of_w) / _norm(w)})
        findings.append(Finding(aspect, label, "as of others"))
    taken = abs(eta - unadapted) > 0.01 * unadapted
    first = it.first(p, g, lr=lr, weight_decay=decay)
    seen = _norm(first) / (lr * _norm(g + decay * p))
    denominators = {
        "‖g‖ + λ ‖p‖": _norm(g) + decay * _norm(p),
        "‖g + λ p‖": _norm(g + decay * p),
        "‖g‖": _norm(g),
    }
    found = _closest(seen, {name: eta * _norm(p) / size for name, size in denominators.items()})
    findings.insert(0, Finding("ratio divides by", found if taken else "no ratio", "‖g‖ + λ ‖p‖"))
    again = it.steps([p], [[g], [10 * g]], many)
    growth = _norm(again[1][0]) / _norm(again[0][0])
    shrunk = _norm(p - again[0][0]) / _norm(p)
    normalised = {"the gradient": mu + shrunk, "the momentum": shrunk}
    findings.insert(0, Finding("normalises", _closest(growth, normalised), "the gradient"))
    stopped = it.steps([p], [[g], [g]], [many, many | {"lr": 0.0}])
    inside = _norm(stopped[1][0]) > 1e-9 * _norm(stopped[0][0])
    findings.append(Finding("learning rate", "in the momentum" if inside else "outside", "in the momentum"))
    at_rest = _norm(it.first(p, torch.zeros_like(p), lr=lr, weight_decay=decay)) / (lr * decay * _norm(p))
    rests = {"kept": 1.0, "kept, times the ratio": eta / decay, "dropped": 0.0}
    findings.append(Finding("decay where g = 0", _closest(at_rest, rests), "kept"))
    small = _norm(it.first(100 * p, g, lr=1e-6, weight_decay=SOME)) / (1e-6 * 100 * _norm(p))
    bound = _closest(small, {"none": eta, "lr ratio ≤ lr": unadapted / 100})
    return [*findings, Finding("bound", bound, "none"), _overwrites(it)]


def _novograd(it: _Subject) -> list[Finding]:
    b1, b2 = it.group["betas"][:2]
    lr = 0.01
    p, g = _drawn(6, 4), _drawn(6, 4, seed=1)
    plain = {"lr": lr, "weight_decay": 0.0}
    length = _norm(it.first(p, g, **plain)) / lr
    starts = {
        "v = ‖g‖²": 1.0,
        "v = ‖g‖², averaged": 1 - b1,
        "v = (1 - β₂) ‖g‖²": 1 / math.sqrt(1 - b2),
        "v = ‖g‖², divided by 1 - β₂ᵗ": math.sqrt(1 - b2),
    }
    begun = _closest(length, starts)
    second = it.steps([p], [[g], [g]], plain)[1][0]
    growth = _norm(second) / (lr * length)
    like_the_first = "all" if begun.endswith("averaged") else "none"
    new = _closest(growth, {like_the_first: 1 + b1, "from the second on": 1.0})
    turned = it.steps([p], [[g], [10 * g]], plain)[1][0]
    scaled = 10 / math.sqrt(b2 + (1 - b2) * 100)
    gain = 1.0 if new == "none" else 1 - b1
    first = 1 - b1 if new == "all" else 1.0
    order = _closest(
        _norm(turned) / lr,
        {
            "before the momentum": b1 * first + gain * scaled,
            "after it": (b1 + 10) / math.sqrt(b2 + 100 * (1 - b2)),
        },
    )
    late = _norm(it.steps([p], [[torch.zeros_like(g)], [g]], plain)[1][0]) / lr
    zero = {"v begins at the next": gain, "v stays 0": gain / math.sqrt(1 - b2)}
    moved = it.steps([p], [[g], [torch.zeros_like(g)]], [plain | {"weight_decay": 0.5}, plain])[1][
        0
    ].flatten()
    basis = torch.stack([g.flatten(), p.flatten()], 1)
    of_p = float(torch.linalg.lstsq(basis, moved[:, None]).solution[1])
    inside = abs(of_p) > 1e-6
    return [
        Finding("first step", begun, "v = ‖g‖²"),
        Finding("averages new terms", new, "none"),
        Finding("normalises", order, "before the momentum"),
        Finding("after a first g = 0", _closest(late, zero), "v begins at the next"),
        Finding("decay", "in the momentum" if inside else "outside it", "in the momentum"),
        _overwrites(it),
    ]


def _adafactor(it: _Subject) -> list[Finding]:
    def rms(x: Tensor) -> float:
        return _norm(x) / math.sqrt(x.numel())

    p, g, lr, late = 2 * _drawn(6, 4), torch.ones(6, 4, dtype=torch.float64), 0.5, 225
    plain = {"lr": lr, "weight_decay": 0.0}
    sizes = [rms(it.first(scale * p, g, **plain)) for scale in (1.0, 10.0)]
    scaled = _closest(sizes[1] / sizes[0], {"by RMS(p)": 10.0, "not": 1.0})
    moves = [rms(move[0]) for move in it.steps([p], [[g]] * late + [[100 * g]], plain, hold=True)]
    final = moves[late - 1] / (rms(p) if scaled == "by RMS(p)" else 1.0)
    schedules = {"lr": lr, "min(lr, 1 / √t)": late**-0.5, "min(0.01, 1 / √t)": 0.01}
    schedule = _closest(final, schedules, 0.03)  # momenta in bf16 are off by as much
    first = moves[0] / moves[late - 1] / (late**0.5 * lr if schedule == "min(lr, 1 / √t)" else 1.0)
    beta = max(0.0, 1 - first)
    spike = 100 / math.sqrt(1 + late**-0.8 * (100**2 - 1))
    bounded = {"RMS(U) ≤ 1": 1.0, "none": spike}
    clipped = _closest((moves[late] / moves[late - 1] - beta) / (1 - beta), bounded, 0.03)
    return [
        Finding("step is scaled", scaled, "by RMS(p)"),
        Finding("given a learning rate, takes", schedule, "lr"),
        Finding("momentum", "none" if beta < 0.01 else f"β₁ = {beta:.2g}", "none"),
        Finding("clipping", clipped, "RMS(U) ≤ 1"),
        Finding("factors of (40, 20, 3, 50)", _factors(it), "the two largest"),
        _overwrites(it),
    ]


def _factors(it: _Subject) -> str:
    """The dimensions that are factored, as the sizes of the states tell."""
    shape = (40, 20, 3, 50)
    whole = math.prod(shape)
    it.steps([_drawn(*shape)], [[_drawn(*shape, seed=1)]])
    sizes = [x.numel() for x in it.state[0].values() if isinstance(x, Tensor) and x.numel() > 1]
    held = {size for size in sizes if size < whole}
    names = {"the two largest": (0, 3), "the last two": (2, 3), "the first two": (0, 1)}
    layouts = {name: {whole // shape[d] for d in pair} for name, pair in names.items()}
    return next(
        (name for name, expected in layouts.items() if held == expected), "others" if held else "none"
    )


def _sm3(it: _Subject) -> list[Finding]:
    lr = 0.1
    plain = {"lr": lr, "momentum": 0.0}
    p, g = _drawn(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    first, second = (move[0] for move in it.steps([p], [[g], [g]], plain))
    variant = _closest(float(first[0, 0] / first[1, 1]), {"II": 1.0, "I": 0.5})
    shrinks = float(second[1, 1] / first[1, 1])  # 1 / √(1 + β)
    kept = "averages" if 0.72 < shrinks < 1 else _closest(shrinks, {"sums": 1 / math.sqrt(2)})
    it.steps([_drawn(8, 6)], [[_drawn(8, 6, seed=1)]], plain)
    numbers = sum(x.numel() for x in it.state[0].values() if isinstance(x, Tensor) and x.numel() > 1)
    memory = _closest(numbers, {"rows and columns": 14, "and a buffer like p": 14 + 48})
    vector = it.steps([p[0]], [[g[0]], [g[0]]], plain)[1][0]
    adagrad = _closest(float(vector[0]) / lr, {"AdaGrad": 1 / math.sqrt(2)})
    return [
        Finding("variant", variant, "II"),
        Finding("accumulators", kept, "sums"),
        Finding("state without momentum", memory, "rows and columns"),
        Finding("vectors", adagrad, "AdaGrad"),
        _overwrites(it),
    ]


def _overwrites(it: _Subject) -> Finding:
    return Finding("gradients", "kept" if it.keeps_gradients else "overwritten", "kept")


_PROBES: dict[str, Callable[[_Subject], list[Finding]]] = {
    "lamb": _lamb,
    "lars": _lars,
    "novograd": _novograd,
    "adafactor": _adafactor,
    "sm3": _sm3,
}

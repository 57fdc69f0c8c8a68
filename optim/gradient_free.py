"""Gradients without backward passes, left in `p.grad` so that any optimizer can step on them.

`loss(call)` computes the loss with `call(*inputs)` in place of `model(*inputs)`. Equal seeds give equal
directions, on every rank: average losses or slopes over ranks before use, and all ranks move alike.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

Loss = Callable[[Callable[..., Any]], Tensor]


@torch.no_grad()
def finite_difference(
    model: nn.Module, loss: Loss, *, seed: int, epsilon: float = 1e-3, antithetic: bool = True
) -> Tensor:
    """Zeroth-order gradient along one random direction u ~ N(0, I) over all parameters; returns f(x).

    g = (f(x + ε u) - f(x)) / ε · u, or with `antithetic` (f(x + ε u) - f(x - ε u)) / 2ε · u, whose bias is
    O(ε²), not O(ε). Nesterov, Spokoiny 2017. In fp32 ε near 1e-3 balances bias and rounding. Antithetic, the
    returned loss is the mean of both sides. The weights are put back bitwise.
    """
    parameters = _trained(model)
    start = [p.detach().clone() for p in parameters]

    def at(distance: float) -> Tensor:
        for p, origin, u in zip(parameters, start, directions(parameters, seed), strict=True):
            p.copy_(origin + distance * u)
        return loss(model)

    ahead, behind = at(epsilon), at(-epsilon if antithetic else 0.0)
    for p, origin in zip(parameters, start, strict=True):
        p.copy_(origin)
    slope = (ahead - behind) / (2 * epsilon if antithetic else epsilon)
    for p, u in zip(parameters, directions(parameters, seed), strict=True):
        _leave(p, slope * u)
    return (ahead + behind) / 2 if antithetic else behind


def forward_gradient(model: nn.Module, loss: Loss, *, seed: int) -> Tensor:
    """Forward gradient g = (∇f · v) v, v ~ N(0, I) over all parameters; returns f(x).

    Baydin et al. 2022, arXiv:2202.08587 v1, Algorithm 1. Unbiased; one forward pass in forward-mode
    differentiation, so every operation of the model must have a forward formula.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tangents = dict(zip(named, directions(list(named.values()), seed), strict=True))

    def value(weights: dict[str, Tensor]) -> Tensor:
        return loss(lambda *args, **kwargs: torch.func.functional_call(model, weights, args, kwargs))

    with torch.no_grad():
        weights = {name: p.detach() for name, p in named.items()}
        found, slope = cast(tuple[Tensor, Tensor], torch.func.jvp(value, (weights,), (tangents,)))
        for name, p in named.items():
            _leave(p, slope * tangents[name])
    return found


class GradientlessDescent:
    """Gradientless descent. Golovin et al. 2020, arXiv:1911.06317 v3, Algorithms 1 (search) and 2 (fast).

    Each estimate tries random steps v of several radii and leaves x - argmin f in `p.grad`, so that SGD with
    lr 1 moves to the best point, x itself included; any monotone transformation of f gives the same steps.

    Search: radii `largest` / 2ⁱ down to `smallest`. Fast, where `condition` Q bounds f's condition number:
    radii within a factor 4 √Q of a radius R that starts at `largest` and is halved every n Q log Q estimates,
    n the dimension.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        largest: float,
        smallest: float | None = None,
        condition: float | None = None,
        seed: int = 0,
    ) -> None:
        if (smallest is None) == (condition is None):
            raise ValueError("GradientlessDescent: give either smallest (search) or condition (fast)")
        self.estimates = 0
        self._model, self._seed = model, seed
        self._largest, self._smallest, self._condition = largest, smallest, condition

    def radii(self) -> list[float]:
        """The radii of the next estimate."""
        if self._smallest is not None:
            count = math.ceil(math.log2(self._largest / self._smallest))
            return [self._largest / 2**i for i in range(count + 1)]
        assert self._condition is not None
        dimension = sum(p.numel() for p in _trained(self._model))
        span = math.ceil(math.log2(4 * math.sqrt(self._condition)))
        every = max(1, math.ceil(dimension * self._condition * math.log(max(self._condition, math.e))))
        radius = self._largest / 2 ** (self.estimates // every)
        return [radius * 2.0**-k for k in range(-span, span + 1)]

    @torch.no_grad()
    def estimate(self, loss: Loss) -> Tensor:
        """Leave x - argmin in `p.grad` and return the smallest loss found; x is put back bitwise."""
        parameters = _trained(self._model)
        start = [p.detach().clone() for p in parameters]
        best, best_step = loss(self._model), [torch.zeros_like(p) for p in parameters]
        for number, radius in enumerate(self.radii()):
            step = list(directions(parameters, hash((self._seed, self.estimates, number)) % 2**63))
            length = torch.sqrt(
                sum((v.double().square().sum() for v in step), start=torch.zeros(()).double())
            )
            step = [(radius / length).to(v.dtype) * v for v in step]
            for p, origin, v in zip(parameters, start, step, strict=True):
                p.copy_(origin + v)
            found = loss(self._model)
            if found < best:
                best, best_step = found, step
        for p, origin, v in zip(parameters, start, best_step, strict=True):
            p.copy_(origin)
            _leave(p, -v)
        self.estimates += 1
        return best


def directions(parameters: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Standard normal directions like the parameters, drawn on the CPU: the same on every device and rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p) for p in parameters]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _leave(p: Tensor, gradient: Tensor) -> None:
    """Set `p.grad`, in place where it is a persistent view."""
    if p.grad is None:
        p.grad = gradient.to(p)
    else:
        p.grad.copy_(gradient)

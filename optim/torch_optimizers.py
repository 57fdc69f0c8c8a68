"""The optimizers that torch already has exactly: which class, with what, and what they do."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optim.engine.shards import local_parts
from optim.flat import FlatOptimizer, is_dense, plain


@dataclass(frozen=True)
class FromTorch:
    """An optimizer of torch's.

    Args:
        kind: its class.
        about: what it does, in the form of our rules' docstrings.
        fixed: arguments that make it the optimizer of that name.
        defaults: published defaults where torch's differ.
        fused: whether torch has a fused kernel, which is then used where it is right.
    """

    kind: type[torch.optim.Optimizer]
    about: str
    fixed: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    fused: bool = False


FROM_TORCH = {
    "sgd": FromTorch(
        torch.optim.SGD,
        """Stochastic gradient descent. Robbins, Monro 1951.

        Update: p = p - lr (g + λ p)
        State: none; with `momentum` 4 bytes per parameter.""",
        fused=True,
    ),
    "momentum": FromTorch(
        torch.optim.SGD,
        """SGD with momentum. Polyak 1964; Sutskever et al. 2013.

        Update: b = μ b + g + λ p (b = g + λ p at the first step), p = p - lr b
        State: b: 4 bytes per parameter.
        Deviations of others: lr inside the buffer (Caffe), which differs where lr changes.""",
        defaults={"momentum": 0.9},
        fused=True,
    ),
    "nag": FromTorch(
        torch.optim.SGD,
        """Nesterov's accelerated gradient. Nesterov 1983; Sutskever et al. 2013.

        Update: b = μ b + g + λ p, p = p - lr (g + λ p + μ b)
        State: b: 4 bytes per parameter.""",
        fixed={"nesterov": True},
        defaults={"momentum": 0.9},
        fused=True,
    ),
    "rprop": FromTorch(
        torch.optim.Rprop,
        """Resilient propagation. Riedmiller, Braun 1993; iRprop- of Igel, Hüsken 2000.

        Update: η = 1.2 η where g keeps its sign, 0.5 η and g = 0 where it turns, p = p - η sign(g)
        State: η and the last g: 8 bytes per parameter.
        Deviations of others: optax gives the previous step's update.
        Use: full batches only; the sign of a noisy gradient means little.""",
    ),
    "adagrad": FromTorch(
        torch.optim.Adagrad,
        """AdaGrad. Duchi, Hazan, Singer 2011.

        Update: v = v + g², p = p - lr g / (√v + ε)
        State: v: 4 bytes per parameter.
        Deviations of others: optax and TensorFlow start v at 0.1 and have ε inside the root.""",
        fused=True,
    ),
    "rmsprop": FromTorch(
        torch.optim.RMSprop,
        """RMSProp. Tieleman, Hinton 2012.

        Update: v = α v + (1 - α) g², p = p - lr g / (√v + ε)
        State: v: 4 bytes per parameter; with `momentum` and `centered` 4 more each.
        Deviations of others: TensorFlow starts v at 1 and has ε inside the root and lr inside the
    momentum.""",
    ),
    "adadelta": FromTorch(
        torch.optim.Adadelta,
        """Adadelta. Zeiler 2012, arXiv:1212.5701 v1, Algorithm 1.

        Update: v = ρ v + (1 - ρ) g², d = √(x + ε) / √(v + ε) g, x = ρ x + (1 - ρ) d², p = p - lr d
        State: v, x: 8 bytes per parameter.""",
    ),
    "adam": FromTorch(
        torch.optim.Adam,
        """Adam. Kingma, Ba 2014, arXiv:1412.6980 v9, Algorithm 1.

        Update: m = β₁ m + (1 - β₁) g, v = β₂ v + (1 - β₂) g², p = p - lr m̂ / (√v̂ + ε), both debiased by 1 -
        βᵗ
        State: m, v: 8 bytes per parameter.""",
        fused=True,
    ),
    "adamw": FromTorch(
        torch.optim.AdamW,
        """AdamW. Loshchilov, Hutter 2017, arXiv:1711.05101 v3, Algorithm 2.

        Update: Adam's, and p = p - lr λ p
        State: m, v: 8 bytes per parameter.
        Deviations: the paper multiplies λ by the schedule only, all libraries by lr.""",
        fused=True,
    ),
    "adamax": FromTorch(
        torch.optim.Adamax,
        """AdaMax. Kingma, Ba 2014, arXiv:1412.6980 v9, Algorithm 2.

        Update: m = β₁ m + (1 - β₁) g, u = max(β₂ u, |g| + ε), p = p - lr / (1 - β₁ᵗ) m / u
        State: m, u: 8 bytes per parameter.
        Deviations of others: Keras divides by u + ε; the paper has no ε.""",
    ),
    "nadam": FromTorch(
        torch.optim.NAdam,
        """NAdam. Dozat 2016.

        Update: Adam's with Nesterov's momentum, μ = β₁ (1 - 0.5 · 0.96^(t ψ))
        State: m, v: 8 bytes per parameter.
        Deviations of others: optax has a constant μ. Torch keeps the product of μ in fp32.""",
    ),
    "amsgrad": FromTorch(
        torch.optim.Adam,
        """AMSGrad. Reddi, Kale, Kumar 2018, arXiv:1904.09237 v1, Algorithm 2.

        Update: Adam's with max(v) in place of v
        State: m, v, max(v): 12 bytes per parameter.
        Deviations of others: the paper debiases nothing; optax takes the maximum after debiasing.""",
        fixed={"amsgrad": True},
        fused=True,
    ),
    "radam": FromTorch(
        torch.optim.RAdam,
        """RAdam. Liu et al. 2019, arXiv:1908.03265 v4, Algorithm 2.

        Update: Adam's times the rectification r(t) where ρ(t) > 5, else p = p - lr m̂
        State: m, v: 8 bytes per parameter.
        Deviations of others: the paper has ρ > 4, the authors' code ρ ≥ 5, and it skips the first steps.""",
    ),
}


class TorchOptimizer(FlatOptimizer):
    """An optimizer of torch's, whose parameters and gradients may lie in flat buffers."""

    may_fuse = False
    """Whether steps choose between torch's fused kernels and its others; else its own arguments decide."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seen: list[Any] = []

    def move(self) -> None:
        """Move the weights as torch does."""
        if self.may_fuse:
            self._choose_kernels()
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)), local_parts(self):
            plain(super(FlatOptimizer, self).step)()

    def _choose_kernels(self) -> None:
        """Fuse each group whose parameters allow it; asked anew only where something looks different."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients: list[Any] = [p.grad for p in parameters]
        seen: list[Any] = [list(map(id, parameters)), [g.layout for g in gradients]]
        if set(seen[1]) == {torch.strided}:
            seen += [[p.stride() for p in parameters], [g.stride() for g in gradients]]
        if seen != self._seen:
            self._seen = seen
            for group in self.param_groups:
                group["fused"] = self._fuses([p for p in group["params"] if p.grad is not None])

    def _fuses(self, parameters: list[Tensor]) -> bool:
        """Whether fused kernels are right for all of these; then the counts of steps are where they look."""
        begun = {self.state[p].get("momentum_buffer") is not None for p in parameters}
        if len(begun) > 1:  # of which torch's fused SGD makes an error
            return False
        if not all(_is_plain(p) and self._agrees_in_memory(p) for p in parameters):
            return False
        for p in parameters:
            if isinstance(step := self.state[p].get("step"), Tensor):
                self.state[p]["step"] = step.to(p.device, torch.float32)
        return True

    def _agrees_in_memory(self, p: Tensor) -> bool:
        """Whether gradient and states lie like their parameter: fused kernels do not look at strides."""
        strides = p.stride()
        tensors = (x for x in (p.grad, *self.state[p].values()) if isinstance(x, Tensor))
        return is_dense(p) and all(x.stride() == strides for x in tensors if x.dim() == len(strides))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch has it."""
        super().load_state_dict(state_dict)
        self._seen = []

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"may_fuse": self.may_fuse}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = []


def _is_plain(p: Tensor) -> bool:
    """Whether fused kernels take the parameter and its gradient: dense, of real numbers, no subclass's."""
    g = p.grad
    return (
        type(p) in (Tensor, nn.Parameter)
        and p.device.type in ("cpu", "cuda")
        and p.is_floating_point()
        and g is not None
        and not g.is_sparse
        and g.dtype == p.dtype
    )


def _flat_class(kind: type[torch.optim.Optimizer]) -> type[TorchOptimizer]:
    """A class of torch's as a `TorchOptimizer`, under a name that pickle finds here."""
    name = f"Flat{kind.__name__}"
    globals()[name] = type(name, (TorchOptimizer, kind), {"__module__": __name__})
    return globals()[name]


FLAT = {kind: _flat_class(kind) for kind in {entry.kind for entry in FROM_TORCH.values()}}
"""Torch's classes, each as a `TorchOptimizer`."""

"""Every optimizer by name: our rules, found by their files, and those that torch already has exactly."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

import optim.rules
from optim.engine.chunks import EngineName
from optim.engine.shards import LayerShard, rows_of_worker
from optim.flat import FlatOptimizer
from optim.rule import Rule
from optim.torch_optimizers import FLAT, FROM_TORCH

_KERNELS = {"foreach", "fused", "capturable", "differentiable"}
"""Constructor arguments of torch's that say how to compute, not what."""

_MACHINERY = _KERNELS | {"params", "engine", "flatten"}
"""All such arguments."""


@cache
def rules() -> dict[str, type[Rule]]:
    """Our own rules by name: every `Rule` that a module of `optim.rules` defines, named like its module."""
    return {module.name: _rule_in(module.name) for module in pkgutil.iter_modules(optim.rules.__path__)}


def _rule_in(module_name: str) -> type[Rule]:
    module = importlib.import_module(f"optim.rules.{module_name}")
    defined = [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__]
    return next(kind for kind in defined if issubclass(kind, Rule))


@cache
def names() -> tuple[str, ...]:
    """The names of all optimizers."""
    return (*FROM_TORCH, *rules())


def build(
    name: str, params: ParamsT, *, flatten: bool = False, engine: EngineName = "auto", **hyper: Any
) -> FlatOptimizer:
    """The optimizer of that name over parameters or parameter groups.

    Args:
        name: one of `names()`.
        params: as for any optimizer of torch.
        flatten: move parameters and gradients into flat buffers, `optimizer.flat`.
        engine: of our own rules; of torch's, "exact" leaves fused kernels out, which round the end of a
            tensor in another way than the rest.
        hyper: its hyperparameters, `hyperparameters(name)`; for torch's also `fused`, `foreach`, `capturable`
            and `differentiable`, as its class takes them. Without these its fused kernels are used, where
            there are any, for the steps in which they are right.

    Raises:
        ValueError: an unknown name.
        TypeError: a hyperparameter that this optimizer does not have.
    """
    known = hyperparameters(name)
    unknown = set(hyper) - set(known) - (set() if name in rules() else _KERNELS)
    if unknown:
        raise TypeError(
            f"{name}: unknown hyperparameter {', '.join(sorted(unknown))}; it has {', '.join(known)}"
        )
    if name in rules():
        return rules()[name](params, flatten=flatten, engine=engine, **hyper)
    entry = FROM_TORCH[name]
    optimizer = FLAT[entry.kind](params, **(entry.fixed | entry.defaults | hyper))
    optimizer.may_fuse = entry.fused and engine != "exact" and not _KERNELS & set(hyper)
    if flatten:
        optimizer.flatten()
    return optimizer


def hyperparameters(name: str) -> dict[str, Any]:
    """Argument names and published defaults, in the order of the constructor."""
    if name not in names():
        raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(names())}")
    entry = FROM_TORCH.get(name)
    arguments = inspect.signature(entry.kind if entry else rules()[name]).parameters
    skipped = _MACHINERY | set(entry.fixed if entry else ())
    found = {key: argument.default for key, argument in arguments.items() if key not in skipped}
    return found | (entry.defaults if entry else {})


def state_bytes(
    name: str, params_or_shapes: Iterable[Tensor | Sequence[int]], *, workers: int = 1, **hyper: Any
) -> int:
    """Bytes of state that training these parameters would hold, found without allocating any.

    Args:
        params_or_shapes: parameters, or shapes of fp32 ones.
        workers: whose number the layers are spread over, as `fully_shard` does it; the state is then that of
            the worker with the most.
    """
    wholes = [_on_meta(given) for given in params_or_shapes]
    if not wholes:
        return 0
    params = [nn.Parameter(p[rows_of_worker(len(p), 0, workers)]) if p.dim() else p for p in wholes]
    if name not in rules():
        bytes_of = {dtype: _torchs_bytes(name, dtype, hyper) for dtype in {p.dtype for p in params}}
        return sum(p.numel() * bytes_of[p.dtype][0] + bytes_of[p.dtype][1] for p in params)
    rule = rules()[name](params, **hyper)
    if workers > 1:
        rule.shards = {
            part: LayerShard(p.shape, 0, part.numel())
            for part, p in zip(params, wholes, strict=True)
            if p.dim()
        }
    states = [rule.initial_state(p, rule.param_groups[0]) for p in params]
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def _torchs_bytes(name: str, dtype: torch.dtype, hyper: dict[str, Any]) -> tuple[int, int]:
    """Bytes of state per number of a parameter, and per parameter, as a step on two numbers shows them:
    torch's rules keep arrays like the parameter, and single numbers.
    """
    entry, p = FROM_TORCH[name], nn.Parameter(torch.zeros(2, dtype=dtype))
    kind: Any = FLAT[entry.kind]
    optimizer = kind([p], **(entry.fixed | entry.defaults | hyper), foreach=False)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    values = [value for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    like_p = [value.element_size() for value in values if value.shape == p.shape]
    return sum(like_p), sum(value.nbytes for value in values if value.shape != p.shape)


def _on_meta(given: Tensor | Sequence[int]) -> nn.Parameter:
    if isinstance(given, Tensor):
        return nn.Parameter(
            torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device="meta")
        )
    return nn.Parameter(torch.empty(tuple(given), device="meta"))

"""What our optimizers have in common, so that each one's file holds its paper's lines and nothing else."""

import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
from torch import Tensor

from optim.engine.chunks import Layer, TensorView
from optim.engine.engine import Engine, EngineName, chosen
from optim.engine.exact import ExactEngine
from optim.engine.layers import StepLayers
from optim.engine.shards import LayerShard, Reduce, as_dtensor, local, shard_of, whole_or_part
from optim.engine.stage import Function, compute_dtype, stages_of
from optim.flat import FlatOptimizer


class Rule(FlatOptimizer):
    """An optimizer given by its mathematics.

    A subclass declares, as annotated class attributes, its hyperparameters with their published defaults, in
    the order of its constructor (a rule derived from another changes some of its defaults), and:

    * `elements`: names of states shaped like the parameter; `layer_states`: names of states of one number per
      layer; `scratch`: arrays like the parameter that one stage leaves for a later one, which works them out
      again where it gets None (in compiled code, where memory costs more than arithmetic);
    * `numbers(h, t)`: numbers of step t, worked out on the host in double precision;
    * `stages`: functions in turn of numbers and of layers. The first, third, … `f(h, p, g, m, …)` take arrays
      by name and return a dict: p, states and scratch are written; what the next stage asks for by name are
      pairs of arrays, whose inner product is summed over each layer. The second, fourth, … `f(h, p2, …)` take
      vectors with one float64 number per layer: layer states are written, everything else they return becomes
      a number `h.…` of the stages that follow.

    Every constructor also takes `maximize`, `engine` ("auto", "tensor", "rows", "compiled", or "exact": sums
    that are the same bits however layers are cut) and `flatten` (parameters and gradients move into flat
    buffers, see `flat`). A group's `adapt` (default True) is `h.adapt`.
    """

    hyper: ClassVar[dict[str, Any]] = {}
    words: ClassVar[dict[str, tuple[Any, ...]]] = {}
    elements: ClassVar[tuple[str, ...]] = ()
    layer_states: ClassVar[tuple[str, ...]] = ()
    scratch: ClassVar[tuple[str, ...]] = ()
    stages: ClassVar[tuple[Function | None, ...]] = ()
    needs_whole_layers: ClassVar[bool] = False
    """Whether no reduction could make up for a layer's being spread over workers."""

    _engine: Engine | None = None
    shards: Mapping[Tensor, LayerShard] = MappingProxyType({})
    """Which parts of layers parameters are, where a program cuts layers itself; DTensors say so."""
    reduce: Reduce | None = None
    """What completes the sums and maxima of layers that are cut; DTensors bring their process group."""

    def __init_subclass__(cls) -> None:
        """Turn the annotated class attributes into the constructor's arguments."""
        super().__init_subclass__()
        kinds = inspect.get_annotations(cls, eval_str=True)
        words = {name: _words(kind) for name, kind in (kinds | {"maximize": bool}).items()}
        cls.words = cls.words | {name: known for name, known in words.items() if known}
        cls.hyper = cls.hyper | {name: cls.__dict__[name] for name in kinds}
        for name in kinds:
            delattr(cls, name)  # an attribute `optimizer.lr` would invite to set it, and change nothing
        options: dict[str, Any] = {"maximize": False, "engine": "auto", "flatten": False}
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
            + [
                _argument(name, value, inspect.Parameter.POSITIONAL_OR_KEYWORD)
                for name, value in cls.hyper.items()
            ]
            + [_argument(name, value, inspect.Parameter.KEYWORD_ONLY) for name, value in options.items()]
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(type(self)).bind(*args, **kwargs)
        given.apply_defaults()
        hyper = given.arguments
        params, flatten = hyper.pop("params"), hyper.pop("flatten")
        _refuse_other_than("engine", hyper["engine"], get_args(EngineName))
        self._choice: EngineName = hyper.pop("engine")
        self._holds_some_layers = _is_made_by_zero_redundancy()
        super().__init__(params, hyper)
        if flatten:
            self.flatten()

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        """Numbers of step t = 1, 2, … in addition to the hyperparameters, in double precision."""
        return {}

    @classmethod
    def rounds(cls, groups: Sequence[Mapping[str, Any]]) -> tuple[Function | None, ...]:
        """The stages that these groups' options need."""
        return cls.stages

    @classmethod
    def sums_all_layers(cls, groups: Sequence[Mapping[str, Any]]) -> str | None:
        """The option of these groups for which a function of layers adds them all up."""
        return None

    @classmethod
    def state_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        """Names and shapes of a parameter's state."""
        return dict.fromkeys(cls.elements, shape) | dict.fromkeys(cls.layer_states, torch.Size())

    @classmethod
    def tensor_view(cls, h: Mapping[str, Any], shape: torch.Size, contiguous: bool) -> TensorView | None:
        """How the stages look at a tensor whose dimensions matter; None where each number stands by itself.

        Such a tensor is cut along its first dimension only. Stages then return `total(x)` or `largest(x)` for
        arrays with size 1 in some dimensions, and stages that take neither p nor g work on those arrays.

        Args:
            h: the group's numbers.
            shape: of the parameter.
            contiguous: whether it and everything like it can be viewed in other shapes.
        """
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its missing hyperparameters are the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in self.hyper:
            _refuse_out_of_range(name, group[name])
        for name, words in self.words.items():
            _refuse_other_than(name, group[name], words)
        if self.needs_whole_layers and any(hasattr(p, "placements") for p in group["params"]):
            raise ValueError(
                f"{type(self).__name__} needs whole matrices, and DTensors are spread over workers; give "
                "these parameters to another optimizer, or train them replicated (DDP)"
            )
        if any(p.is_complex() for p in group["params"]):
            raise ValueError(f"{type(self).__name__} does not support complex parameters")
        if self._sees_layers() and any(getattr(p, "_fsdp_flattened", False) for p in group["params"]):
            raise ValueError(
                f"{type(self).__name__} needs whole layers, of which FullyShardedDataParallel leaves pieces "
                "that nothing tells apart; use torch.distributed.fsdp.fully_shard"
            )
        self._begin_anew()

    @torch.no_grad()
    def move(self) -> None:
        """Run the rule's stages. Parameters without gradient are left alone, with their states."""
        layers = self._layers.begin(self)
        if layers:
            self._engine = self._engine or self._new_engine(layers)
            self._engine.step(layers, self.flat_or_none, self.reduce)
        self._layers.end(self)

    def _sees_layers(self) -> bool:
        """Whether it does more than take each number by itself."""
        stages = (stage for stage, _ in stages_of(self.rounds(self.param_groups), self.layer_states))
        return any(stage.sums or stage.joins for stage in stages)

    def _begin_anew(self) -> None:
        """Forget where things lay: what comes next finds them again."""
        self._layers = StepLayers()
        self._engine = None

    def _new_engine(self, layers: Sequence[Layer]) -> Engine:
        if self._holds_some_layers and (option := self.sums_all_layers(self.param_groups)):
            raise RuntimeError(
                f"{type(self).__name__}: {option} needs all layers, of which ZeroRedundancyOptimizer gives "
                f"each rank its own alone; set it off, or use torch.distributed.fsdp.fully_shard"
            )
        kind = chosen(self._choice, [layer.parameter for layer in layers])
        rounds = stages_of(self.rounds(self.param_groups), self.layer_states)
        return ExactEngine(rounds) if kind == "exact" else Engine(rounds, kind)

    def initial_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state before the first step: zeros, in the order of memory of the parameter."""
        state, shard = self.state[p], self.shard_of(p)
        state["step"] = 0
        p, dtype = local(p), compute_dtype(p)
        whole = p.shape if shard is None else shard.shape
        for name, shape in self.state_shapes(group, whole).items():
            if shape != whole:
                state[name] = p.new_zeros(shape if shard is None else shard.here(shape), dtype=dtype)
            elif p.is_meta:  # of which zeros_like would import sympy
                state[name] = p.new_empty_strided(p.shape, p.stride(), dtype=dtype)
            else:
                state[name] = torch.zeros_like(p, dtype=dtype)
        return state

    def shard_of(self, p: Tensor) -> LayerShard | None:
        """Which part of a layer a parameter is; None for whole layers.

        Raises:
            ValueError: it is no part that `shards` or its placements can mean.
        """
        if self.needs_whole_layers and p in self.shards:
            raise ValueError(
                f"{type(self).__name__} needs whole matrices, and shards cuts them; leave it out"
            )
        shard = self.shards.get(p)
        if shard is not None and p.shape != shard.here(shard.shape):
            raise ValueError(
                f"shards: a parameter of shape {tuple(p.shape)} is no run of whole slices of {shard}"
            )
        return shard or shard_of(p)

    def scalars_of(self, group: Mapping[str, Any], t: int) -> dict[str, Any]:
        """A group's hyperparameters, pairs apart (beta1, beta2), and the rule's own numbers of step t."""
        numbers: dict[str, Any] = {"adapt": bool(group.get("adapt", True)), "maximize": group["maximize"]}
        for name in self.hyper:
            value = group[name]
            if isinstance(value, (tuple, list)):
                stem = "beta" if name == "betas" else name
                numbers |= {f"{stem}{i}": v for i, v in enumerate(value, start=1)}
            else:
                numbers[name] = value.reshape(()) if isinstance(value, Tensor) else value
        return numbers | self.numbers(SimpleNamespace(**numbers), t)

    def state_dict(self) -> dict[str, Any]:
        """Torch's form. States are copies of their own: nothing of the buffers shows or is saved. Those of
        DTensors are DTensors.
        """
        packed = super().state_dict()
        held = [(p, group) for group in self.param_groups for p in group["params"]]
        numbers = [number for group in packed["param_groups"] for number in group["params"]]
        for number, (p, group) in zip(numbers, held, strict=True):
            if number in packed["state"]:
                packed["state"][number] = self._packed(p, group, packed["state"][number])
        return packed

    def _packed(self, p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a parameter's state, as it is saved."""
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        if (shard := self.shard_of(p)) is None:
            return own
        shapes = self.state_shapes(group, shard.shape)
        return own | {
            name: as_dtensor(own[name], p, shard, shape) for name, shape in shapes.items() if name in own
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load torch's form. States keep the dtype they are computed in: torch's own load casts them down.

        Hyperparameters that an older version did not save are the constructor's.

        Raises:
            ValueError: a saved state is another optimizer's; nothing has been loaded then.
        """
        final: dict[str, Any] = {}

        def check(_: Any, given: dict[str, Any]) -> None:
            final.update(given)
            self._refuse_others_states(final)

        last_hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            last_hook.remove()
        for number, p, group in self._numbered(final):
            shard = self.shard_of(p)
            shapes = {} if shard is None else self.state_shapes(group, shard.shape)
            for name, value in final["state"].get(number, {}).items():
                if name == "step":
                    self.state[p]["step"] = int(value)
                elif isinstance(value, Tensor) and value.is_floating_point():
                    if shard is not None and name in shapes:
                        value = whole_or_part(value, p, shard, shapes[name])
                    self.state[p][name] = local(value).to(p.device, compute_dtype(p), copy=True)
        self._complete_groups()
        self._begin_anew()

    def _numbered(self, saved: Mapping[str, Any]) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        """Saved number, parameter and options of each parameter."""
        for group, own in zip(saved["param_groups"], self.param_groups, strict=False):
            for number, p in zip(group["params"], own["params"], strict=False):
                yield number, p, own | group

    def _refuse_others_states(self, saved: Mapping[str, Any]) -> None:
        for number, p, group in self._numbered(saved):
            state, shard = saved["state"].get(number), self.shard_of(p)
            known = self.state_shapes(group, p.shape if shard is None else shard.shape)
            if state and (missing := {"step", *known} - state.keys()):
                name, lost, held = type(self).__name__, ", ".join(sorted(missing)), ", ".join(sorted(state))
                raise ValueError(
                    f"{name}: the saved state of parameter {number} lacks {lost}; it has {held}: load what a "
                    f"{name} with these options has saved"
                )

    def _complete_groups(self) -> None:
        """Give groups that an older version saved the hyperparameters that it did not know."""
        known = self.hyper | {"maximize": False}
        for group in self.param_groups:
            for name, published in known.items():
                group.setdefault(name, self.defaults.get(name, published))

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_choice", "_holds_some_layers")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._complete_groups()
        self._begin_anew()


def _is_made_by_zero_redundancy() -> bool:
    """Whether torch's ZeroRedundancyOptimizer is making this optimizer, for some of the layers."""
    maker, frame = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer"), sys._getframe()
    while frame is not None and maker is not None:
        if frame.f_globals is vars(maker):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _argument(name: str, default: Any, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, kind, default=default)


def _words(kind: Any) -> tuple[Any, ...]:
    """The values that an annotation allows, if it counts them."""
    return (True, False) if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()


def _refuse_other_than(name: str, value: Any, words: tuple[Any, ...]) -> None:
    if not any(value is word or (isinstance(value, str) and value == word) for word in words):
        raise ValueError(f"Invalid {name} value: {value!r}; it is one of {', '.join(map(repr, words))}")


def _refuse_out_of_range(name: str, value: Any) -> None:
    """Raise torch's error for a hyperparameter that no rule can work with."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    elif name == "lr" and value is not None and not value >= 0.0:
        raise ValueError(f"Invalid learning rate: {value}")
    elif name == "betas":
        for index, beta in enumerate(value):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    elif name in ("eps", "weight_decay", "momentum", "max_grad_norm", "trust_coefficient"):
        for number in value if isinstance(value, (tuple, list)) else [value]:
            if number is not None and not 0.0 <= number < math.inf:
                raise ValueError(f"Invalid {name} value: {number}")

"""The layers that take part in a step: the same list as long as nothing has moved."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from optim.engine.chunks import Layer, LayerCohort, Shapes
from optim.engine.shards import LayerShard, local, local_gradient
from optim.engine.stage import compute_dtype
from optim.flat import FlatBuffers


class LayerSource(Shapes, Protocol):
    """What the layers of an optimizer are made of."""

    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def flat_or_none(self) -> FlatBuffers | None:
        """The flat buffers, if parameters lie in some."""

    def shard_of(self, p: Tensor) -> LayerShard | None:
        """Which part of a layer a parameter is; None for whole layers."""

    def initial_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter before its first step."""

    def state_shapes(self, h: Mapping[str, Any], shape: torch.Size) -> Mapping[str, torch.Size]:
        """Names and shapes of a parameter's state."""

    def scalars_of(self, group: Mapping[str, Any], t: int) -> dict[str, Any]:
        """The numbers of a group at step t."""


class StepLayers:
    """The layers of an optimizer and its count of their steps.

    This is the one place that asks whether anything has moved. Nothing here is state: a parameter, gradient
    or state that was moved, replaced or converted since the last step is noticed by its address, on the host
    alone; so are other options and another number of threads. Then `begin` returns a new list.
    """

    def __init__(self) -> None:
        self._seen: list[Any] | None = None
        self._options: list[tuple[Any, ...]] = []
        self._steps = 0
        self._layers: list[Layer] = []
        self._taking_part: list[Layer] = []
        self._cohorts: list[tuple[dict[str, Any], LayerCohort]] = []

    def begin(self, rule: LayerSource) -> list[Layer]:
        """Return the layers that have gradients, with those and with the numbers of the step that begins."""
        seen, gradients = _look(rule, self._steps)
        if seen != self._seen:
            self._note(rule)
            self._seen = None  # until `end`: the step may move states to where it wants them
        self._steps += 1
        for layer, gradient in zip(self._layers, gradients, strict=True):
            layer.gradient = gradient
            layer.state["step"] += 1
        for group, cohort in self._cohorts:
            cohort.step += 1
            cohort.take(rule.scalars_of(group, cohort.step))
        options = [cohort.options for _, cohort in self._cohorts]
        if options != self._options:  # they decide which layers are worked on together
            self._options, self._taking_part = options, list(self._taking_part)
        return self._taking_part

    def end(self, rule: LayerSource) -> None:
        """Note where everything lies after a step, and let gradients go."""
        if self._seen is None:
            self._seen, _ = _look(rule, self._steps)
        for layer in self._layers:
            del layer.gradient

    def _note(self, rule: LayerSource) -> None:
        cohorts: dict[tuple[int, int], LayerCohort] = {}
        self._layers = []
        for number, group in enumerate(rule.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    state = rule.state[p] if "step" in rule.state[p] else rule.initial_state(p, group)
                    key = number, state["step"]
                    cohort = cohorts.setdefault(key, LayerCohort(len(cohorts), state["step"]))
                    here, shard = local(p), rule.shard_of(p)
                    states = tuple(rule.state_shapes(group, p.shape if shard is None else shard.shape))
                    layer = Layer(here, here, state, cohort, rule, states, shard)
                    for name, value in layer.tensors().items():  # the parameter may have got another dtype
                        state[name] = value.to(here.device, compute_dtype(here))
                    self._layers.append(layer)
        self._cohorts = [(rule.param_groups[number], cohort) for (number, _), cohort in cohorts.items()]
        self._taking_part = [layer for layer in self._layers if layer.shape.numel()]


def _look(rule: LayerSource, steps: int) -> tuple[list[Any], list[Tensor]]:
    """Where everything lies and what it is, and the gradients."""
    members = [p for group in rule.param_groups for p in group["params"]]
    parameters = [p for p in members if p.grad is not None]
    gradients = [local_gradient(p) for p in parameters]
    if any(g.is_sparse for g in gradients):
        raise RuntimeError(f"{type(rule).__name__} does not support sparse gradients")
    states = [rule.state[p] for p in parameters]
    seen = [  # column by column: this is done at every step
        rule.flat_or_none,
        torch.get_num_threads(),
        [len(group["params"]) for group in rule.param_groups],
        [local(p).data_ptr() for p in parameters],
        [p.dtype for p in parameters],
        [g.dtype for g in gradients],
        [g.stride() for g in gradients],
        [state.get("step", 0) - steps for state in states],
        [x.data_ptr() for state in states for x in state.values() if isinstance(x, Tensor)],
    ]
    return seen, gradients

"""Who takes part in a step: the layers of an optimizer, the same ones as long as nothing has moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from optim.engine.chunks import Cohort, Layer

if TYPE_CHECKING:
    from optim.rule import Rule


class Roll:
    """The layers of an optimizer and its count of their steps.

    It holds no truth: whatever was moved, replaced or converted since the last step is noticed by its
    address, on the host alone, and then all layers are noted anew.
    """

    def __init__(self) -> None:
        self._seen: list[Any] | None = None
        self._calls = 0
        self._layers: list[Layer] = []
        self._taking_part: list[Layer] = []
        self._cohorts: list[tuple[dict[str, Any], Cohort]] = []

    def call(self, rule: Rule) -> list[Layer]:
        """The layers that have gradients, with those and with the numbers of the step that begins: the same
        list as long as nothing has moved.
        """
        seen, gradients = self._look(rule)
        if seen != self._seen:
            self._note(rule)
            self._seen = None  # until `dismiss`: the step may move states to where it wants them
        self._calls += 1
        for layer, gradient in zip(self._layers, gradients, strict=True):
            layer.gradient = gradient
            layer.state["step"] += 1
        for group, cohort in self._cohorts:
            cohort.step += 1
            cohort.take(rule.numbers_of(group, cohort.step))
        return self._taking_part

    def dismiss(self, rule: Rule) -> None:
        """After the step: what lies where it lies now has not moved; gradients may go."""
        if self._seen is None:
            self._seen, _ = self._look(rule)
        for layer in self._layers:
            del layer.gradient

    def _look(self, rule: Rule) -> tuple[list[Any], list[Tensor]]:
        """Where everything lies and what it is, and the gradients."""
        members = [p for group in rule.param_groups for p in group["params"]]
        parameters = [p for p in members if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if any(g.is_sparse for g in gradients):
            raise RuntimeError(f"{type(rule).__name__} does not support sparse gradients")
        states = [rule.state[p] for p in parameters]
        seen = [  # column by column: this is done at every step
            [len(group["params"]) for group in rule.param_groups],
            [p.data_ptr() for p in parameters],
            [p.dtype for p in parameters],
            [g.dtype for g in gradients],
            [g.stride() for g in gradients],
            [state.get("step", 0) - self._calls for state in states],
            [x.data_ptr() for state in states for x in state.values() if isinstance(x, Tensor)],
        ]
        return seen, gradients

    def _note(self, rule: Rule) -> None:
        cohorts: dict[tuple[int, int], Cohort] = {}
        self._layers = []
        for number, group in enumerate(rule.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    state = rule.state[p] or rule.begin(p, group)
                    cohort = cohorts.setdefault((number, state["step"]), Cohort(len(cohorts), state["step"]))
                    self._layers.append(Layer(p, p.grad, state, cohort, rule))
        self._cohorts = [(rule.param_groups[number], cohort) for (number, _), cohort in cohorts.items()]
        self._taking_part = [layer for layer in self._layers if layer.parameter.numel()]

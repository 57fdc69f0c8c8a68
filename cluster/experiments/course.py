"""A trial's course: what it is told, how its metric has gone so far, and when it is over."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cluster.experiments.trials import Ask, End, Trial, crossing
from trainer.errors import UserError
from trainer.recipe.schema import Recipe
from trainer.recipe.train import Target

MOST_POINTS = 60  # of a curve that is kept
NO_PART = {"name", "run", "checkpoint", "track"}  # of what is computed


@dataclass(frozen=True)
class Order(Ask):
    """A trial to train, with its recipe, which has the target."""

    recipe: Recipe

    @cached_property
    def key(self) -> str:
        """A hash of the resolved recipe, without what changes nothing."""
        values = self.recipe.model_dump(mode="json", exclude=NO_PART)
        values["reduction"] = self.recipe.run.reduction
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Course:
    """How one trial goes.

    Args:
        growth: of the steps from one evaluation to the next.
        total: steps of the trial's recipe.
    """

    order: Order
    growth: float
    total: int
    curve: list[tuple[int, float]] = field(default_factory=list)
    end: End | None = None
    steps: float | None = None
    trained: int = 0
    test: dict[str, float] = field(default_factory=dict)
    _next_at: int = 1

    @property
    def target(self) -> Target:
        """What it trains to."""
        target = self.order.recipe.train.target
        assert target is not None
        return target

    def wants(self, step: int) -> bool:
        """Whether the metrics are wanted after this step."""
        return step >= min(self._next_at, self.order.limit, self.total)

    @property
    def wants_test(self) -> bool:
        """Whether the metrics of the test split are wanted."""
        return self.end == "reached" and self.order.stage == "report"

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the validation metrics after a step, which may end the trial."""
        name = self.target.metric
        if name not in metrics:
            raise UserError(f"target.metric: the task has no {name}; it has {', '.join(metrics)}")
        value, self.trained = metrics[name], step
        if not math.isfinite(value):
            self.diverged(step)
            return
        self.curve.append((step, value))
        self._next_at = max(step + 1, int(step * self.growth))
        if self.target.reached(value):
            self.steps, self.end = crossing(self.curve[-2:], self.target), "reached"
        elif step >= self.total:
            self.end = "unreached"
        elif step >= self.order.limit:
            self.end = "stopped"

    def diverged(self, step: int) -> None:
        """The loss, a gradient or the metric is no number."""
        self.trained, self.end = step, "diverged"

    def trial(self, seconds: float) -> Trial:
        """What the trial brought, once it has ended."""
        order = self.order
        assert self.end is not None
        return order.brought(
            self.end,
            self.trained,
            self.steps,
            key=order.key,
            seconds=seconds,
            curve=tuple(thinned(self.curve)),
            test=self.test,
        )


def thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most 60 points of a curve, its first and its last among them."""
    if len(curve) <= MOST_POINTS:
        return curve
    last = len(curve) - 1
    return [curve[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]

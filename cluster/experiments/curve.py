"""Steps to the target and best rate against the batch, of one arm of a sweep or of a reference table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cluster.experiments.forecast import Forecaster, Prior
from cluster.experiments.laws import (
    Interval,
    RateLaw,
    StepsLaw,
    fit_rates,
    geometric_mean,
    mean_interval,
    saturating_at,
)
from cluster.experiments.trials import Axes, Cell, Study, Trial

SEED_SD = 0.15  # of log steps, where no batch has two runs; what digits have


@dataclass(frozen=True)
class Point:
    """One batch: the steps of its runs at the best rate, but for `failed` ones that fell short of the target;
    `is_edge` says that the best rate is the lowest or the highest one tried.
    """

    batch: int
    runs: tuple[float, ...]
    rate: float | None = None
    failed: int = 0
    is_edge: bool = False

    @property
    def steps(self) -> float:
        """The geometric mean of its runs; where some fell short, the median, for which they count as longer
        than all others.
        """
        if not self.failed:
            return geometric_mean(self.runs)
        return float(np.median([*self.runs, *[np.inf] * self.failed]))

    @property
    def is_usable(self) -> bool:
        """Whether more runs reached the target than fell short."""
        return len(self.runs) > self.failed

    def interval(self, level: float = 0.95) -> Interval:
        """Of that mean, by Student's t; the mean itself where there is one run."""
        return mean_interval(self.runs, level)


@dataclass(frozen=True)
class Curve:
    """The points of an arm at one value of each axis, or of a reference, and what its search has cost.

    Attributes:
        trials, examples: of search and report together.
    """

    arm: str
    points: tuple[Point, ...]
    axes: Axes = ()
    trials: int = 0
    examples: int = 0

    @property
    def name(self) -> str:
        """The arm with the values of the axes."""
        return " ".join([self.arm, *(f"{key}={value}" for key, value in self.axes)])

    @classmethod
    def of(cls, study: Study, arm: str, axes: Axes = ()) -> Curve:
        """An arm of a sweep at one value of each axis: at each batch the runs at the best rate, of the report
        where there are any.
        """
        points = []
        for batch in study.batches:
            cell = Cell(arm, batch, axes)
            if (rate := study.best.get(cell)) is None:
                continue
            tried = study.at(cell)
            chosen = [t for t in tried if np.isclose(t.rate, rate, rtol=1e-3)]
            chosen = [t for t in chosen if t.stage == "report"] or chosen
            if chosen:
                points.append(_point(batch, rate, chosen, tried))
        spent = [t for t in study.trials if (t.cell.arm, t.cell.axes) == (arm, axes)]
        return cls(arm, tuple(points), axes, len(spent), sum(t.examples for t in spent))

    @property
    def usable(self) -> list[Point]:
        """The points to fit: most of their runs reached the target."""
        return [point for point in self.points if point.is_usable]

    @property
    def seed_sd(self) -> float:
        """Standard deviation of log steps between runs of one batch, pooled over batches."""
        several = [np.log(point.runs) for point in self.usable if len(point.runs) > 1]
        if not several:
            return SEED_SD
        squares = sum(float(np.sum((each - each.mean()) ** 2)) for each in several)
        return float(np.sqrt(squares / sum(len(each) - 1 for each in several)))

    @property
    def measured(self) -> tuple[list[int], list[float], list[int], float]:
        """Batches, steps and runs of the usable points, and the scatter of seeds: a forecast's data."""
        points = self.usable
        return (
            [p.batch for p in points],
            [p.steps for p in points],
            [len(p.runs) for p in points],
            self.seed_sd,
        )

    @cached_property
    def steps_law(self) -> StepsLaw | None:
        """The law, or None with fewer than three usable batches."""
        return StepsLaw.fit(*self.measured[:2]) if len(self.usable) > 2 else None

    @cached_property
    def rate_laws(self) -> dict[str, RateLaw]:
        """The rules for the best rate, the best first; none with fewer than two rates."""
        known = [(p.batch, p.rate) for p in self.usable if p.rate is not None]
        return fit_rates(*zip(*known, strict=True)) if len(known) > 1 else {}

    @property
    def fit(self) -> dict[str, float]:
        """The laws' numbers by their names, as far as the points tell: `rate_exponent` is that of rate ∝ B^x,
        and b_crit_low to b_crit_high an interval of 95 %.
        """
        found: dict[str, float] = {}
        if law := self.steps_law:
            low, high = law.profile_interval()
            found |= {"s_min": law.s_min, "b_crit": law.b_crit, "b_crit_low": low, "b_crit_high": high}
            found["log_r2"] = law.log_r2
        if power := self.rate_laws.get("power"):
            found["rate_exponent"] = power.parameters["exponent"]
        return found

    def rates_beyond(self, forecaster: Forecaster) -> RateLaw:
        """The rule for batches larger than those tried: it saturates where the steps do. ValueError with
        fewer than two best rates.
        """
        known = [(p.batch, p.rate) for p in self.usable if p.rate is not None]
        return saturating_at(forecaster.b_crit, [b for b, _ in known], [rate for _, rate in known])

    def up_to(self, largest: int) -> Curve:
        """The same without the larger batches."""
        return replace(self, points=tuple(point for point in self.points if point.batch <= largest))

    def forecaster(self, prior: Prior | None = None) -> Forecaster:
        """What other batches would need. ValueError with fewer than two usable batches."""
        return Forecaster.fit(*self.measured, prior)


def curves(study: Study) -> list[Curve]:
    """Every arm of a sweep at every value of its axes, in the sweep's order, where there are best rates."""
    axes = list(dict.fromkeys(cell.axes for cell in study.best))
    found = [Curve.of(study, arm, each) for arm in study.arms for each in axes]
    return [curve for curve in found if curve.points]


def prior_of(curve: Curve, others: Sequence[Curve]) -> Prior | None:
    """What the other arms of a sweep say beforehand of an arm's critical batch; None without any."""
    known = [other.steps_law.b_crit for other in others if other.name != curve.name and other.steps_law]
    return Prior.of(known) if known else None


def _point(batch: int, rate: float, chosen: list[Trial], tried: list[Trial]) -> Point:
    rates = {t.rate for t in tried if t.stage == "search"} or {rate}
    reached = tuple(t.steps for t in chosen if t.steps is not None)
    is_edge = not min(rates) < rate * 0.999 or not max(rates) > rate * 1.001
    return Point(batch, reached, rate, len(chosen) - len(reached), is_edge)

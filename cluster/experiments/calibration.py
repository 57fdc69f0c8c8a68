"""How often do forecasts hold? Every curve is forecast from its small batches and graded at its large ones.

Settings are chosen on the other curves only, and so is the prior: what is graded has taught neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from cluster.experiments.curve import Curve, prior_of
from cluster.experiments.forecast import LEVEL, Forecaster, Prediction, Prior, Settings, seed_bootstrap

MODEL_ERRORS, GROWTHS, BENDS = (0.04, 0.08, 0.12, 0.16), (0.0, 0.08), (0.0, 0.35)
Method = Callable[[Curve, Sequence[int]], list[Prediction]]


@dataclass(frozen=True)
class Grade:
    """A forecast beside what was measured later."""

    name: str
    forecast: Prediction
    measured: float

    @property
    def is_held(self) -> bool:
        """Whether the interval has it."""
        return self.forecast.holds(self.measured)

    @property
    def penalty(self) -> float:
        """Interval score in log steps (Gneiting and Raftery 2007): the width, and for a miss its distance
        times 2 / (1 - level). Lowest in expectation for the true quantiles.
        """
        low, high, at = np.log([self.forecast.low, self.forecast.high, self.measured])
        miss = max(low - at, at - high, 0.0)
        return float(high - low + 2 / (1 - self.forecast.level) * miss)


@dataclass(frozen=True)
class Calibration:
    """Grades of one method over several curves."""

    grades: tuple[Grade, ...]

    @property
    def coverage(self) -> float:
        """Share of intervals that held."""
        return float(np.mean([grade.is_held for grade in self.grades]))

    @property
    def coverage_by_name(self) -> dict[str, float]:
        """The same, for each curve."""
        names = dict.fromkeys(grade.name for grade in self.grades)
        return {n: float(np.mean([g.is_held for g in self.grades if g.name == n])) for n in names}

    def coverage_interval(self, level: float = 0.95, draws: int = 4000) -> tuple[float, float]:
        """Of the coverage, by drawing whole curves with replacement: grades of one curve hang together."""
        held = np.array(list(self.coverage_by_name.values()))
        drawn = np.random.default_rng(0).choice(held, (draws, len(held))).mean(axis=1)
        low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
        return float(low), float(high)

    @property
    def width(self) -> float:
        """Median ratio of the intervals' ends."""
        return float(np.median([grade.forecast.width for grade in self.grades]))

    @property
    def bias(self) -> float:
        """Median of forecast over measured steps."""
        return float(np.median([grade.forecast.median / grade.measured for grade in self.grades]))


def leave_one_out(
    replicas: Sequence[Sequence[Curve]], fitted_up_to: int, graded_up_to: int
) -> tuple[Calibration, dict[str, Settings]]:
    """Each curve graded with the settings that the others choose; `replicas` holds the same curves several
    times, from other seeds. Returns the grades, and the settings by curve.
    """
    names = [curve.name for curve in replicas[0]]
    options = [Settings(*each) for each in product(MODEL_ERRORS, GROWTHS, BENDS)]
    chosen = {}
    grades: list[Grade] = []
    for left_out in names:
        others = [[curve for curve in replica if curve.name != left_out] for replica in replicas]
        score = {
            settings: np.mean(
                [g.penalty for g in with_settings(others, fitted_up_to, graded_up_to, settings)]
            )
            for settings in options
        }
        chosen[left_out] = min(options, key=score.__getitem__)
        own = with_settings(replicas, fitted_up_to, graded_up_to, chosen[left_out])
        grades += [grade for grade in own if grade.name == left_out]
    return Calibration(tuple(grades)), chosen


def graded(curve: Curve, fitted_up_to: int, graded_up_to: int, method: Method) -> list[Grade]:
    """A curve's larger batches, forecast by `method` from its smaller ones."""
    small = curve.up_to(fitted_up_to)
    later = [point for point in curve.usable if fitted_up_to < point.batch <= graded_up_to]
    forecasts = method(small, [point.batch for point in later])
    return [Grade(curve.name, each, point.steps) for each, point in zip(forecasts, later, strict=True)]


def by_bootstrap(curve: Curve, wanted: Sequence[int]) -> list[Prediction]:
    """The method that resamples seeds and nothing else."""
    points = curve.usable
    return seed_bootstrap([point.runs for point in points], [point.batch for point in points], wanted)


def parts(curves: Sequence[Curve], runs: int) -> list[list[Curve]]:
    """The curves as often as their points have `runs` runs of their own, at least once."""
    count = max(1, min(len(point.runs) for curve in curves for point in curve.usable) // runs)
    return [[_with_runs(curve, slice(k * runs, (k + 1) * runs)) for curve in curves] for k in range(count)]


def with_settings(
    replicas: Sequence[Sequence[Curve]],
    fitted_up_to: int,
    graded_up_to: int,
    settings: Settings | None = None,
) -> Iterator[Grade]:
    """Of each curve with the same settings, those that ship unless others are given. The prior is what the
    others say from batches no larger.
    """
    for curves in replicas:
        for curve in curves:
            method = _with(settings, prior_of(curve, [other.up_to(fitted_up_to) for other in curves]))
            yield from graded(curve, fitted_up_to, graded_up_to, method)


def _with(settings: Settings | None, prior: Prior | None) -> Method:
    def forecasts(curve: Curve, wanted: Sequence[int]) -> list[Prediction]:
        forecaster = Forecaster.fit(*curve.measured, prior, settings)
        runs = round(float(np.median(curve.measured[2])))
        return [forecaster.predict(batch, runs, LEVEL) for batch in wanted]

    return forecasts


def _with_runs(curve: Curve, chosen: slice) -> Curve:
    return replace(curve, points=tuple(replace(point, runs=point.runs[chosen]) for point in curve.points))

"""Steps to target against the learning rate in one cell, and over all cells of a strand. Rates are in octaves
(log2), steps in natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares

from cluster.experiments.trials import Trial

SEED_NOISE = 0.13  # standard deviation of ln steps between seeds, as measured on digits
GIVEN_UP, DIVERGED = 0.25, 1.0  # ln steps above the best one's that such a trial takes at least
NEAR = 1.6  # octaves: the neighbours in a bracket of one octave
FURTHEST = 0.75  # octaves from the middle of a bracket to the lowest point of its parabola
NEAREST = 0.6  # octaves: a rate this near stands for the one that a bracket wants


@dataclass
class Bowl:
    """The trials of one cell by rate.

    Args:
        sign: 1 where less of the target's metric is better, -1 where more is.
    """

    sign: int = 1
    trials: dict[float, list[Trial]] = field(default_factory=dict)

    def add(self, trial: Trial) -> None:
        """One more trial; of two with the same seed the later one counts."""
        here = self.trials.setdefault(octaves(trial.rate), [])
        here[:] = [other for other in here if other.seed != trial.seed] + [trial]

    @property
    def reached(self) -> bool:
        """Whether any trial has come to the target."""
        return any(trial.steps is not None for here in self.trials.values() for trial in here)

    @property
    def longest(self) -> int:
        """The steps of the longest trial."""
        return max(trial.trained_steps for here in self.trials.values() for trial in here)

    def has(self, x: float) -> bool:
        """Whether a rate was tried, or one that stands for it in a bracket of octaves."""
        return any(abs(x - other) < NEAREST for other in self.trials)

    def means(self) -> dict[float, float]:
        """Mean ln steps at each rate. Who was given up counts with the steps that it was trained, but with
        more than the best rate takes; who diverged, with none that anybody could wait for.
        """
        reached = {x: [math.log(t.steps) for t in here if t.steps] for x, here in self.trials.items()}
        least = min((float(np.mean(values)) for values in reached.values() if values), default=0.0)
        rates = sorted(self.trials)
        return {x: float(np.mean([_ln_steps(trial, least) for trial in self.trials[x]])) for x in rates}

    def best(self, tolerance: float) -> float:
        """The lowest of the rates whose mean is within a tolerance of the least; while no trial has reached
        the target, the rate that has come nearest to it.
        """
        if not self.reached:
            return min(self.trials, key=lambda x: min(self._distance(trial) for trial in self.trials[x]))
        means = self.means()
        least = min(means.values())
        return min(x for x, mean in means.items() if mean <= least + math.log1p(tolerance))

    def near(self, x: float) -> list[float]:
        """The rates of the bracket around one."""
        return sorted(other for other in self.trials if abs(other - x) < NEAR)

    def lowest(self, tolerance: float) -> float:
        """Where the parabola through the best rate and its neighbours is lowest."""
        best, means = self.best(tolerance), self.means()
        near = [x for x in self.near(best) if math.isfinite(means[x])]
        below, above = [x for x in near if x < best], [x for x in near if x > best]
        if not below or not above:
            return best
        x = np.array([below[-1], best, above[0]])
        curvature, slope, _ = np.polyfit(x - best, [means[each] for each in x], 2)
        if curvature <= 0:
            return best
        return best + float(np.clip(-slope / 2 / curvature, -FURTHEST, FURTHEST))

    def _distance(self, trial: Trial) -> float:
        """How far a trial is from the target, in an order of its own."""
        if trial.end == "diverged" or not trial.curve:
            return math.inf
        return self.sign * trial.curve[-1][1]

    @property
    def steps(self) -> float:
        """The least mean steps to target of a rate; the longest training where none was reached."""
        return math.exp(min(self.means().values()))


def octaves(rate: float) -> float:
    """A rate in octaves, the same for rates that are equal but for rounding."""
    return round(math.log2(rate), 9)


def surface(bowls: Mapping[int, Bowl]) -> dict[int, float]:
    """The best rate of each batch, if one law holds for all: it saturates, and bowls have one shape.

    ln S = u_B + k± (x - x_B)², with a gentler and a steeper side, and x_B = a - α log2(1 + B_lr / B); fitted
    with a soft loss, trials that were given up as lower bounds.
    """
    batches = sorted(bowls)
    least = np.array([min(bowls[batch].means().values()) for batch in batches])
    points = []
    for i, batch in enumerate(batches):
        for trial in (trial for here in bowls[batch].trials.values() for trial in here):
            ln_steps = _ln_steps(trial, least[i])
            y = min(ln_steps, least[i] + DIVERGED) if trial.steps is None else ln_steps
            points.append((i, octaves(trial.rate), y, trial.steps is None))
    number, x, y, is_bound = (np.array(column) for column in zip(*points, strict=True))
    log_batch = np.log2(np.array(batches, float))
    starts = np.array([bowls[batch].best(0.0) for batch in batches])

    def best_rates(law: np.ndarray) -> np.ndarray:
        return law[0] - np.exp(law[1]) * np.log2(1 + 2.0 ** (law[2] - log_batch))

    def residuals(p: np.ndarray) -> np.ndarray:
        bottoms, law, sides = p[: len(batches)], p[len(batches) : -2], np.exp(p[-2:])
        away = x - best_rates(law)[number]
        model = bottoms[number] + np.where(away < 0, sides[0], sides[1]) * away**2
        off = np.where(is_bound & (model > y), 0, (y - model) / SEED_NOISE)
        priors = [*(p[-2:] - np.log([0.2, 0.5])) / 0.7, (law[1] - math.log(0.7)) / 0.5, (law[2] - 6) / 2]
        return np.concatenate([off, priors])

    fits = [
        least_squares(
            residuals,
            np.concatenate([least, [starts.max(), math.log(0.7), knee], np.log([0.2, 0.5])]),
            loss="soft_l1",
            max_nfev=200,
        )
        for knee in (4.0, 7.0)
    ]
    law = min(fits, key=lambda fit: fit.cost).x[len(batches) : -2]
    return dict(zip(batches, best_rates(law).tolist(), strict=True))


def forecast(best: Mapping[int, float], batch: int) -> float:
    """The rate to begin with at a batch: on the line through the three nearest that are known; of one,
    half an octave for each octave of the batch.
    """
    nearest = sorted(best, key=lambda known: abs(math.log2(known / batch)))[:3]
    x = np.array([math.log2(known / batch) for known in nearest])
    y = np.array([best[known] for known in nearest])
    slope = float(np.polyfit(x, y, 1)[0]) if len(nearest) > 1 else 0.5
    return float(y.mean() - np.clip(slope, -0.5, 1.0) * x.mean())


def _ln_steps(trial: Trial, least: float) -> float:
    """Of a trial in a cell whose best rate takes `least`."""
    if trial.end == "diverged":
        return math.inf
    return (
        math.log(trial.steps) if trial.steps else max(math.log(max(1, trial.trained_steps)), least + GIVEN_UP)
    )

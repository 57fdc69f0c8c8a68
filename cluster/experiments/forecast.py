"""How many steps will another batch need? A distribution, from the law of the batches that were tried.

A law fitted to small batches errs at large ones by more than seeds differ: its bend may be softer or sharper
than the hyperbola's, and its critical batch is known poorly where no batch has passed it. Both are averaged
over, on a grid (Bayes), and what the law cannot follow grows with each octave beyond the batches tried.
`cluster.experiments.calibration` measures how often the intervals hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from cluster.experiments.laws import StepsLaw

Array = NDArray[np.float64]
LEVEL = 0.8  # of an interval, unless another is asked for
_KNEES, _EXPONENTS = 60, 9  # points of the grid
_OCTAVES_BELOW, _OCTAVES_ABOVE = 3, 7  # how far from the batches tried a critical batch may lie
_NEGLIGIBLE = 1e-7  # weight of a point of the grid, against the largest
_LEAST_SPREAD = 0.5  # standard deviation of log critical batch in a prior: optimizers differ by this much


@dataclass(frozen=True)
class Settings:
    """What is assumed of the law's errors; all in log steps. Calibrated by benchmarks/forecast.py.

    Attributes:
        model_error: standard deviation of well-measured steps around the law.
        growth: what is added to it, in squares, per octave beyond the largest batch fitted.
        bend: standard deviation of log p in S = S_min (1 + (B_crit / B)^p)^(1 / p).
    """

    model_error: float = 0.08
    growth: float = 0.08
    bend: float = 0.35


@dataclass(frozen=True)
class Prior:
    """What is known of a critical batch beforehand: its log is normal around log `b_crit`."""

    b_crit: float
    log_sd: float

    @classmethod
    def of(cls, known: Sequence[float]) -> Prior:
        """From the critical batches of other arms or tasks, at least one: another of their kind."""
        logs = np.log(np.asarray(known, float))
        spread = max(_LEAST_SPREAD, float(np.std(logs, ddof=1))) if len(logs) > 1 else 2 * _LEAST_SPREAD
        return cls(float(np.exp(logs.mean())), spread * float(np.sqrt(1 + 1 / len(logs))))


@dataclass(frozen=True)
class Prediction:
    """Steps that training takes at a batch: the median, and an interval that holds `level` of the time."""

    batch: float
    low: float
    median: float
    high: float
    level: float

    @property
    def width(self) -> float:
        """The interval's ends as a ratio."""
        return self.high / self.low

    def times(self, factor: float, scatter: float = 0.0) -> Prediction:
        """Of a multiple, whose own log has a standard deviation."""
        reach = float(ndtri(0.5 + self.level / 2)) * scatter
        low, high = (np.hypot(np.log(end / self.median), reach) for end in (self.low, self.high))
        middle = self.median * factor
        return replace(
            self, low=float(middle / np.exp(low)), median=middle, high=float(middle * np.exp(high))
        )

    def holds(self, steps: float) -> bool:
        """Whether measured steps lie inside."""
        return self.low <= steps <= self.high


@dataclass(frozen=True)
class Forecaster:
    """The law's parameters on a grid, weighed by the batches measured.

    Attributes:
        weights, knees, exponents, heights: each point's weight, log critical batch, p, and log s_min.
        height_variance: of each log s_min.
        seed_sd: standard deviation of log steps between seeds.
        largest: the largest batch measured.
    """

    settings: Settings
    weights: Array
    knees: Array
    exponents: Array
    heights: Array
    height_variance: float
    seed_sd: float
    largest: float

    @classmethod
    def fit(
        cls,
        batches: ArrayLike,
        steps: ArrayLike,
        runs: ArrayLike,
        seed_sd: float,
        prior: Prior | None = None,
        settings: Settings | None = None,
    ) -> Forecaster:
        """Of geometric means of `runs` runs per batch. Without a prior, any log critical batch from 3 octaves
        below the batches to 7 above is as likely. ValueError with fewer than two batches.
        """
        x, y, n = (np.asarray(each, float) for each in (batches, np.log(np.asarray(steps, float)), runs))
        if len(np.unique(x)) < 2:
            raise ValueError(f"steps at {len(np.unique(x))} batches; a forecast needs two or more")
        settings = settings or Settings()
        low, high = np.log(x.min() / 2**_OCTAVES_BELOW), np.log(x.max() * 2**_OCTAVES_ABOVE)
        if prior:
            reach = 3 * prior.log_sd
            low, high = min(low, np.log(prior.b_crit) - reach), max(high, np.log(prior.b_crit) + reach)
        deviations = np.linspace(-2.0, 2.0, _EXPONENTS)
        grid = np.meshgrid(np.linspace(low, high, _KNEES), deviations, indexing="ij")
        knees, z = (each.ravel() for each in grid)
        exponents = np.exp(settings.bend * z)
        precision = 1 / (seed_sd**2 / n + settings.model_error**2)
        rest = y - _bend(x, knees[:, None], exponents[:, None])
        heights = rest @ precision / precision.sum()
        log_weights = -0.5 * (rest - heights[:, None]) ** 2 @ precision - 0.5 * z**2
        if prior:
            log_weights -= 0.5 * ((knees - np.log(prior.b_crit)) / prior.log_sd) ** 2
        weights = np.exp(log_weights - log_weights.max())
        kept = weights > _NEGLIGIBLE
        weights = weights[kept] / weights[kept].sum()
        variance = float(1 / precision.sum())
        return cls(
            settings, weights, knees[kept], exponents[kept], heights[kept], variance, seed_sd, float(x.max())
        )

    @property
    def b_crit(self) -> float:
        """The critical batch: the mean of its log over the grid."""
        return float(np.exp(self.weights @ self.knees))

    def predict(self, batch: float, runs: int = 1, level: float = LEVEL) -> Prediction:
        """Of the geometric mean of `runs` runs at a batch."""
        middles, spread = self._mixture(batch, runs)
        grid = np.linspace(middles.min() - 4 * spread, middles.max() + 4 * spread, 400)
        below = self.weights @ ndtr((grid - middles[:, None]) / spread)
        low, median, high = np.exp(np.interp([0.5 - level / 2, 0.5, 0.5 + level / 2], below, grid))
        return Prediction(batch, float(low), float(median), float(high), level)

    def chance(self, batch: float, steps: float) -> float:
        """The probability that one run at this batch needs no more than `steps`."""
        middles, spread = self._mixture(batch, 1)
        return float(self.weights @ ndtr((np.log(steps) - middles) / spread))

    def _mixture(self, batch: float, runs: int) -> tuple[Array, float]:
        octaves = max(0.0, np.log2(batch / self.largest))
        chosen = self.settings
        variance = (
            self.height_variance
            + chosen.model_error**2
            + (chosen.growth * octaves) ** 2
            + self.seed_sd**2 / runs
        )
        return self.heights + _bend(batch, self.knees, self.exponents), float(np.sqrt(variance))


def _bend(batches: float | Array, knees: Array, exponents: Array) -> Array:
    """log S - log S_min: a smooth maximum of 0 and the line of perfect scaling."""
    return np.logaddexp(0, exponents * (knees - np.log(batches))) / exponents


def seed_bootstrap(
    runs: Sequence[Sequence[float]],
    batches: Sequence[float],
    wanted: Sequence[float],
    level: float = LEVEL,
    draws: int = 40,
    seed: int = 0,
) -> list[Prediction]:
    """The usual interval: the law fitted again to seeds drawn with replacement, plus the seeds' own scatter.
    It knows nothing of the law's errors, and is far too narrow; shown to compare with.
    """
    generator = np.random.default_rng(seed)
    count = min(map(len, runs))
    seed_sd = float(np.sqrt(np.mean([np.var(np.log(each), ddof=1) for each in runs])))
    drawn = []
    for _ in range(draws):
        means = [np.exp(np.log(generator.choice(each, len(each))).mean()) for each in runs]
        law = StepsLaw.fit(batches, means)
        drawn.append(np.log(law.steps(wanted)) + generator.normal(0, seed_sd / np.sqrt(count), len(wanted)))
    tails = (0.5 - level / 2, 0.5, 0.5 + level / 2)
    quantiles = np.exp(np.quantile(np.array(drawn), tails, axis=0)).T
    return [
        Prediction(batch, float(low), float(median), float(high), level)
        for batch, (low, median, high) in zip(wanted, quantiles, strict=True)
    ]


@dataclass(frozen=True)
class Probe:
    """One more batch to try: the interval's width at the wanted batch before it, and expected after it."""

    batch: int
    width_before: float
    width_after: float


def probe(
    batches: Sequence[int],
    steps: Sequence[float],
    runs: Sequence[int],
    seed_sd: float,
    wanted: float,
    prior: Prior | None = None,
) -> Probe:
    """The smallest batch, by octaves from the largest one tried, whose one run would halve the interval at
    `wanted` (in log steps) if it came out as forecast; where none would, the one that narrows it most.
    """
    now = Forecaster.fit(batches, steps, runs, seed_sd, prior)
    before = now.predict(wanted).width
    octaves = int(np.ceil(np.log2(wanted / max(batches))))
    found: list[Probe] = []
    for octave in range(1, octaves + 1):
        batch = min(int(wanted), max(batches) * 2**octave)
        likely = now.predict(batch).median
        then = Forecaster.fit([*batches, batch], [*steps, likely], [*runs, 1], seed_sd, prior)
        found.append(Probe(batch, before, then.predict(wanted).width))
        if np.log(found[-1].width_after) <= np.log(before) / 2:
            return found[-1]
    return min(found, key=lambda each: each.width_after)

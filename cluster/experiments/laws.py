"""How steps to a target and the best learning rate follow the batch: functions of tables, in log space.

Steps to target follow S(B) = S_min (1 + B_crit / B) (McCandlish et al. 2018, arXiv:1812.06162).
Far below B_crit twice the batch needs half the steps; far above it more examples buy nothing. The best rate
first grows with the batch and then saturates, or falls again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, least_squares, minimize_scalar, nnls
from scipy.stats import t as student

Array = NDArray[np.float64]
Interval = tuple[float, float]
RATE_ERROR = 0.1  # of a log rate: nearer ones a search cannot tell apart
OCTAVES_BEYOND = 10  # how far outside the batches a critical batch is looked for, in powers of two


@dataclass(frozen=True)
class StepsLaw:
    """S_min (1 + B_crit / B), fitted to steps at several batches by least squares of log steps.

    Attributes:
        s_min: steps that no batch can save.
        b_crit: batch that needs twice s_min steps, and twice the fewest examples.
        covariance: of (log s_min, log b_crit), 2 x 2.
        log_r2: share of the variance of log steps that the law explains.
        residual: standard deviation of log steps around the law, with n - 2 degrees of freedom.
        batches, log_steps: what was fitted.
    """

    s_min: float
    b_crit: float
    covariance: Array
    log_r2: float
    residual: float
    batches: Array
    log_steps: Array

    @classmethod
    def fit(cls, batches: ArrayLike, steps: ArrayLike) -> StepsLaw:
        """Of steps at three batches or more. ValueError where there are fewer, or numbers without a log."""
        x, y = _table(batches, steps, 3, "steps")
        grid = np.log(x.min()) + np.log(2) * np.arange(
            -OCTAVES_BEYOND, OCTAVES_BEYOND + np.log2(np.ptp(x) + 1)
        )
        nearest = grid[np.argmin([_error(knee, x, y) for knee in grid])]
        step = np.log(2)
        found = minimize_scalar(
            _error, bounds=(nearest - step, nearest + step), args=(x, y), method="bounded"
        )
        knee = float(found.x)
        bend = np.log1p(np.exp(knee) / x)
        height = float(np.mean(y - bend))
        rest = y - height - bend
        variance = float(rest @ rest) / (len(x) - 2)
        slopes = np.stack([np.ones_like(x), 1 / (1 + x / np.exp(knee))], axis=1)
        return cls(
            s_min=float(np.exp(height)),
            b_crit=float(np.exp(knee)),
            covariance=np.linalg.pinv(slopes.T @ slopes) * variance,
            log_r2=1 - float(rest @ rest) / max(float(np.sum((y - y.mean()) ** 2)), 1e-30),
            residual=float(np.sqrt(variance)),
            batches=x,
            log_steps=y,
        )

    @property
    def e_min(self) -> float:
        """The fewest examples that any batch needs."""
        return self.s_min * self.b_crit

    @property
    def standard_errors(self) -> tuple[float, float]:
        """Of log s_min and of log b_crit."""
        first, second = np.sqrt(np.diag(self.covariance))
        return float(first), float(second)

    def steps(self, batches: ArrayLike) -> Array:
        """Steps at these batches."""
        return self.s_min * (1 + self.b_crit / np.asarray(batches, float))

    def interval(self, level: float = 0.95) -> tuple[Interval, Interval]:
        """Of s_min and of b_crit, by Student's t around their logs: exact where the law is nearly a line."""
        reach = student.ppf(0.5 + level / 2, len(self.batches) - 2)
        first, second = np.exp(reach * np.sqrt(np.diag(self.covariance)))
        return (self.s_min / first, self.s_min * first), (self.b_crit / second, self.b_crit * second)

    def profile_interval(self, level: float = 0.95) -> Interval:
        """Of b_crit: the values at which the best fit is not significantly worse (F test).

        It need not lie evenly around b_crit, and ends at 0 or infinity where the batches all lie on one side.
        """
        reach = student.ppf(0.5 + level / 2, len(self.batches) - 2)
        allowed = _error(np.log(self.b_crit), self.batches, self.log_steps) + (reach * self.residual) ** 2

        def excess(knee: float) -> float:
            return _error(knee, self.batches, self.log_steps) - allowed

        def end(direction: int, nothing: float) -> float:
            far = np.log(self.b_crit) + direction * 2 * OCTAVES_BEYOND * np.log(2)
            if excess(far) < 0 or not self.residual:
                return self.b_crit if not self.residual else nothing
            return float(np.exp(brentq(excess, np.log(self.b_crit), far)))

        return end(-1, 0.0), end(1, np.inf)

    def band(self, batches: ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
        """Interval of the law itself at these batches: where the mean of many runs would lie."""
        x = np.asarray(batches, float)
        slopes = np.stack([np.ones_like(x), 1 / (1 + x / self.b_crit)])
        spread = np.sqrt(np.einsum("ib,ij,jb->b", slopes, self.covariance, slopes))
        factor = np.exp(student.ppf(0.5 + level / 2, len(self.batches) - 2) * spread)
        return self.steps(x) / factor, self.steps(x) * factor


@dataclass(frozen=True)
class Slope:
    """d log steps / d log batch over some batches: -1 is perfect scaling, 0 none. `se` its standard error."""

    value: float
    se: float


def slope(batches: ArrayLike, steps: ArrayLike) -> Slope:
    """Least-squares slope of log steps against log batch. ValueError with fewer than three batches."""
    x, y = _table(batches, steps, 3, "steps")
    (value, _), covariance = np.polyfit(np.log(x), y, 1, cov=True)
    return Slope(float(value), float(np.sqrt(covariance[0, 0])))


RateFunction = Callable[[Array, Array], Array]  # (parameters, log2 of the batch) -> log of the rate


def _power(p: Array, x: Array) -> Array:
    return p[0] + np.log(2) * p[1] * x


def _saturating(p: Array, x: Array) -> Array:
    return p[0] - p[1] * np.logaddexp(0, np.log(2) * (p[2] - x))


def _peaked(p: Array, x: Array) -> Array:
    return p[0] - np.log(np.cosh(0.5 * np.log(2) * (p[1] - x)))


@dataclass(frozen=True)
class RateRule:
    """A rule for the best rate: its parameters' names, and log rate as a function of them."""

    name: str
    parameters: tuple[str, ...]
    function: RateFunction
    formula: str


RATE_RULES = (
    RateRule("linear", ("rate at batch 1",), lambda p, x: p[0] + np.log(2) * x, "c B"),
    RateRule("sqrt", ("rate at batch 1",), lambda p, x: p[0] + np.log(2) / 2 * x, "c √B"),
    RateRule("power", ("rate at batch 1", "exponent"), _power, "c B^x"),
    RateRule("saturating", ("lr_max", "alpha", "b_lr"), _saturating, "lr_max / (1 + B_lr / B)^α"),
    RateRule("peaked", ("lr_max", "b_peak"), _peaked, "2 lr_max / (√(B_peak / B) + √(B / B_peak))"),
)
"""McCandlish et al. 2018 have the saturating one; Li et al. 2024 (arXiv:2405.14578) the peaked one of Adam
and sign descent, whose rate falls beyond B_peak.
"""


@dataclass(frozen=True)
class RateLaw:
    """A rule fitted to the best rates of several batches.

    Attributes:
        rule: which.
        values: the parameters as the fit has them: logs of rates, log2 of batches, exponents.
        covariance: of `values`; NaN where there are no more points than parameters.
        rms: root mean square of log rate around the rule.
        aicc: Akaike's criterion, corrected for few points: the lowest is the best; infinite with too few.
    """

    rule: RateRule
    values: Array
    covariance: Array
    rms: float
    aicc: float
    freedom: int

    def rates(self, batches: ArrayLike) -> Array:
        """Best rates at these batches."""
        return np.exp(self.rule.function(self.values, np.log2(np.asarray(batches, float))))

    def band(self, batches: ArrayLike, level: float = 0.8) -> tuple[Array, Array]:
        """Interval of a best rate measured at these batches: the rule's error and the points' own scatter."""
        x = np.log2(np.asarray(batches, float))
        moved = [self.values + 1e-5 * unit for unit in np.eye(len(self.values))]
        middle = self.rule.function(self.values, x)
        slopes = np.stack([(self.rule.function(each, x) - middle) / 1e-5 for each in moved])
        scatter = self.rms**2 * (self.freedom + len(self.values)) / max(1, self.freedom)
        scatter = max(scatter, RATE_ERROR**2)
        spread = np.sqrt(np.einsum("ib,ij,jb->b", slopes, self.covariance, slopes) + scatter)
        factor = np.exp(student.ppf(0.5 + level / 2, max(1, self.freedom)) * spread)
        return np.exp(middle) / factor, np.exp(middle) * factor

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters by name, in the units of rates and batches."""
        shown = {}
        for name, value in zip(self.rule.parameters, self.values, strict=True):
            is_batch, is_exponent = name.startswith("b_"), name in ("alpha", "exponent")
            shown[name] = float(value if is_exponent else 2.0**value if is_batch else np.exp(value))
        return shown


def fit_rates(batches: ArrayLike, rates: ArrayLike) -> dict[str, RateLaw]:
    """Every rule that the points can tell, by name, the best first. ValueError with one batch or none."""
    x, y = _table(batches, rates, 2, "rates")
    octaves = np.log2(x)
    fits = [_fit_rate(rule, octaves, y) for rule in RATE_RULES if len(rule.parameters) <= len(x)]
    fits.sort(key=lambda law: (law.aicc, law.rms))
    return {law.rule.name: law for law in fits}


def saturating_at(b_crit: float, batches: ArrayLike, rates: ArrayLike) -> RateLaw:
    """The saturating rule with a known critical batch for B_lr: the rule to extrapolate with. Free rules that
    fit small batches best overshoot large ones by factors (benchmarks/forecast.py). ValueError: one batch.
    """
    x, y = _table(batches, rates, 2, "rates")
    knee = float(np.log2(b_crit))
    rule = RateRule(
        "saturating",
        ("lr_max", "alpha"),
        lambda p, octaves: _saturating(np.array([p[0], p[1], knee]), octaves),
        f"lr_max / (1 + {b_crit:.3g} / B)^α",
    )
    return _fit_rate(rule, np.log2(x), y)


def _fit_rate(rule: RateRule, x: Array, y: Array) -> RateLaw:
    starts = {"exponent": (0.5,), "alpha": (0.5, 1.0)}
    bounds = {"exponent": (-3.0, 3.0), "alpha": (0.2, 1.6)}
    middles = np.linspace(x.min(), x.max(), 3)
    low: list[float] = []
    high: list[float] = []
    first: list[list[float]] = [[]]
    for name in rule.parameters:
        is_batch = name.startswith("b_")
        level = y.max() if name == "lr_max" else float(np.mean(y))
        options = middles if is_batch else starts.get(name, (level,))
        least, most = (x.min() - 4, x.max() + 6) if is_batch else bounds.get(name, (level - 30, level + 30))
        low, high = [*low, least], [*high, most]
        first = [[*start, option] for start in first for option in options]

    def rest(p: Array) -> Array:
        return rule.function(p, x) - y

    found = min(
        (least_squares(rest, start, bounds=(low, high)) for start in first), key=lambda each: each.cost
    )
    n, k = len(x), len(rule.parameters)
    squares = 2 * float(found.cost)
    freedom = n - k
    variance = squares / freedom if freedom else np.nan
    # The scatter counts as a parameter; a perfect fit would have no finite criterion.
    aicc = n * np.log(max(squares, 1e-12) / n) + 2 * (k + 1) * n / (n - k - 2) if n > k + 2 else np.inf
    covariance = np.linalg.pinv(found.jac.T @ found.jac) * variance
    return RateLaw(rule, found.x, covariance, float(np.sqrt(squares / n)), float(aicc), freedom)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: a fixed part, and one for each example that a worker computes.

    Attributes:
        fixed, per_example: seconds, both at least 0.
        scatter: standard deviation of log seconds around the fit.
    """

    fixed: float
    per_example: float
    scatter: float

    @classmethod
    def fit(cls, examples: ArrayLike, seconds: ArrayLike) -> StepTime:
        """Of seconds per step at several examples per worker, all relative errors counting alike."""
        x, y = np.asarray(examples, float), np.asarray(seconds, float)
        (fixed, per_example), _ = nnls(np.stack([1 / y, x / y], axis=1), np.ones_like(x))
        rest = np.log(y / (fixed + per_example * x))
        return cls(float(fixed), float(per_example), float(np.sqrt(np.mean(rest**2))))

    def seconds(self, examples: float) -> float:
        """Of a step in which each worker computes so many examples."""
        return self.fixed + self.per_example * examples


def _error(knee: float, batches: Array, log_steps: Array) -> float:
    """Sum of squares around the law whose log critical batch is `knee`, at its best s_min."""
    rest = log_steps - np.log1p(np.exp(knee) / batches)
    rest = rest - rest.mean()
    return float(rest @ rest)


def _table(batches: ArrayLike, values: ArrayLike, least: int, what: str) -> tuple[Array, Array]:
    x, y = np.asarray(batches, float), np.asarray(values, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{len(x)} batches and {len(y)} {what}; give one of each")
    if not (np.all(np.isfinite(x) & (x > 0)) and np.all(np.isfinite(y) & (y > 0))):
        raise ValueError(f"batches or {what} that are not above 0; leave them out")
    if len(np.unique(x)) < least:
        raise ValueError(f"{what} at {len(np.unique(x))} batches; a fit needs {least} or more")
    return x, np.log(y)


def geometric_mean(values: Sequence[float]) -> float:
    """The mean in log space, in which all fits are made."""
    return float(np.exp(np.mean(np.log(values))))


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Of the geometric mean, by Student's t around the mean of logs; the mean itself where there is one
    value.
    """
    logs = np.log(values)
    if len(logs) < 2:
        return float(values[0]), float(values[0])
    reach = student.ppf(0.5 + level / 2, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return float(np.exp(logs.mean() - reach)), float(np.exp(logs.mean() + reach))

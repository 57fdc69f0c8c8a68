"""The automatic echo factor, proposed from measured speeds."""

from __future__ import annotations

import math
from collections import deque
from statistics import median


class FactorController:
    """Proposes an echo factor from measurements; the caller decides and applies it.

    Echoing gains time up to the ratio R of the cost of a fresh example upstream to that of a served one
    downstream (Choi et al. 2019, arXiv:1907.05550): the time per fresh example is max(upstream, factor *
    downstream). So the factor follows R, the median of the latest measurements, capped and rounded down to
    quarters: a factor above R slows the run, one below it only lets the accelerator wait a little.

    Args:
        cap: the largest factor; too many echoes hurt the model.
        least: below this R the factor is 1.
        tolerance: the relative distance of R from the factor in force beyond which another is proposed.
        window: measurements in the median; a proposal needs more than half of them, all taken since the last
            proposal, since a change costs the time in which the buffer refills.
    """

    def __init__(
        self, *, cap: float = 4.0, least: float = 1.1, tolerance: float = 0.15, window: int = 5
    ) -> None:
        self._cap = cap
        self._least = least
        self._tolerance = tolerance
        self._ratios: deque[float] = deque(maxlen=window)

    @property
    def ratio(self) -> float | None:
        """R, dimensionless; None before the first measurement and right after a proposal."""
        return median(self._ratios) if self._ratios else None

    def propose(self, upstream_s: float, downstream_s: float, factor: float) -> float | None:
        """Record a measurement; returns the factor to change to, or None to keep the one in force.

        Args:
            upstream_s: seconds per fresh example if the whole pool were always busy.
            downstream_s: seconds per served example of the whole run's step, without waiting.
            factor: the factor in force.
        """
        self._ratios.append(upstream_s / downstream_s)
        if 2 * len(self._ratios) <= (self._ratios.maxlen or 0):
            return None
        ratio = min(median(self._ratios), self._cap)
        wanted = 1.0 if ratio < self._least else max(1.0, math.floor(ratio * 4) / 4)
        must_end = factor > 1 and ratio < self._least
        near = abs(ratio / factor - 1) <= self._tolerance and not must_end
        if near or wanted == factor:
            return None
        self._ratios.clear()
        return wanted

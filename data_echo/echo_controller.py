"""The echo factor that the measured speeds ask for."""

from __future__ import annotations

import math
from collections import deque
from statistics import median


class FactorController:
    """Proposes an echo factor from measurements; whoever asks decides and makes it known.

    Echoing pays up to the ratio R of what a fresh example costs upstream to what a served one costs
    downstream (Choi et al. 2019, arXiv:1907.05550): the time per fresh example is max(upstream, factor *
    downstream). So the factor follows R, taken as the median of the latest measurements, capped and rounded
    down to quarters: a factor above R slows the run, one below it only lets the accelerator wait a little.

    Args:
        cap: the largest factor; too many echoes hurt the model.
        least: below this R there is no echo at all.
        tolerance: by which share of the factor in force R must leave it, before another is proposed.
        window: measurements in the median; more than half of them must have been taken, anew after each
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
        """R; None before the first measurement and right after a proposal."""
        return median(self._ratios) if self._ratios else None

    def propose(self, upstream_s: float, downstream_s: float, factor: float) -> float | None:
        """Take a measurement, and say which factor should rule instead of the one in force; None to stay.

        Args:
            upstream_s: seconds per fresh example, were the whole pool always busy.
            downstream_s: seconds per served example of the whole run's step, without waiting.
            factor: in force.
        """
        self._ratios.append(upstream_s / downstream_s)
        if 2 * len(self._ratios) <= (self._ratios.maxlen or 0):
            return None
        ratio = min(median(self._ratios), self._cap)
        wanted = 1.0 if ratio < self._least else max(1.0, math.floor(ratio * 4) / 4)
        near = abs(ratio / factor - 1) <= self._tolerance and (wanted > 1) == (factor > 1)
        if near or wanted == factor:
            return None
        self._ratios.clear()
        return wanted

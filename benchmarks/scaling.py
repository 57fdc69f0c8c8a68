"""Does a sweep follow the laws? python benchmarks/scaling.py SWEEP [--check]

Of every arm: how much of the steps the law explains, slopes of small and large batches beside the law's own
there, and how far rules for the best rate are from it. SWEEP is a sweep's folder, or a journal such as
tests/data/digits_sweep.jsonl.gz. The bars are for the five optimizers of configs/sweeps/digits.yaml.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from forecast import study
from trials import Bar, check_bars, table

from cluster.experiments.curve import Curve, curves
from cluster.experiments.laws import Slope, StepsLaw, slope

SMALL, LARGE = (0, 32), (256, math.inf)  # batches, ends included
RULES = ("linear", "sqrt", "power", "saturating", "peaked")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the bars; with --check exit with 1 where one is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    chosen = parser.parse_args(arguments)
    found = {curve.name: curve for curve in curves(study(chosen.sweep)) if curve.steps_law}
    head = ["", "S_min", "B_crit", "log-R²", "slope to 32 (law)", "slope from 256 (law)"]
    table([*head, *(f"rms of log rate: {rule}" for rule in RULES)], [_row(each) for each in found.values()])
    bars = [bar for curve in found.values() for bar in _bars(curve)]
    if {"sgd", "momentum"} <= found.keys():
        ratio = _law(found["momentum"]).b_crit / _law(found["sgd"]).b_crit
        bars.append(Bar("critical batch of momentum over SGD's", ratio, ">=", 2))
    if "adam" in found:
        rates = {point.batch: point.rate or 0.0 for point in found["adam"].usable}
        share = rates[max(rates)] / max(rates.values())
        bars.append(Bar("adam: best rate at the largest batch over its peak", share, "<=", 0.99))
    check_bars(bars, chosen.check)


def _law(curve: Curve) -> StepsLaw:
    assert curve.steps_law is not None
    return curve.steps_law


def _row(curve: Curve) -> list[object]:
    law = _law(curve)
    slopes = [_slopes(curve, *ends) for ends in (SMALL, LARGE)]
    shown = ["too few" if s is None else f"{s[0].value:.2f} ± {s[0].se:.2f} ({s[1]:.2f})" for s in slopes]
    rates = [f"{curve.rate_laws[rule].rms:.2f}" if rule in curve.rate_laws else "" for rule in RULES]
    return [curve.name, f"{law.s_min:.0f}", f"{law.b_crit:.0f}", f"{law.log_r2:.4f}", *shown, *rates]


def _slopes(curve: Curve, low: float, high: float) -> tuple[Slope, float] | None:
    """The measured slope and the law's; None with fewer than three batches."""
    points = [point for point in curve.usable if low <= point.batch <= high]
    if len(points) < 3:
        return None
    batches = np.array([point.batch for point in points])
    return slope(batches, [point.steps for point in points]), slope(batches, _law(curve).steps(batches)).value


def _bars(curve: Curve) -> list[Bar]:
    bars = [Bar(f"{curve.name}: log-R²", _law(curve).log_r2, ">=", 0.98)]
    for name, ends in (("to 32", SMALL), ("from 256", LARGE)):
        slopes = _slopes(curve, *ends)
        gap = math.inf if slopes is None else abs(slopes[0].value - slopes[1])
        bars.append(Bar(f"{curve.name}: slope {name}, distance from the law's", gap, "<=", 0.2))
    rms = {rule: law.rms for rule, law in curve.rate_laws.items()}
    ratio = rms["saturating"] / rms["power"]
    return [*bars, Bar(f"{curve.name}: saturating rule's error over a power's", ratio, "<=", 0.99)]


if __name__ == "__main__":
    main()

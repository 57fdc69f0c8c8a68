"""How often do forecasts of steps hold? python benchmarks/forecast.py SWEEP [--up-to 64] [--to 512]

Every arm of a sweep is forecast from its batches up to `--up-to` and graded at those up to `--to`: with
settings and a prior that the other arms chose, with the settings that ship, and by resampling seeds. Then
MLPerf's tables, with the settings that ship and no prior. SWEEP is a sweep's folder, or a journal such as
tests/data/digits_sweep.jsonl.gz.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trials import Bar, check_bars, table

from cluster.experiments.calibration import (
    Calibration,
    Grade,
    by_bootstrap,
    graded,
    leave_one_out,
    parts,
    with_settings,
)
from cluster.experiments.curve import Curve, curves, prior_of
from cluster.experiments.forecast import LEVEL
from cluster.experiments.laws import RateLaw
from cluster.experiments.references import mlperf
from cluster.experiments.trials import Study

SHARE_OF_REFERENCE = 4  # a table is forecast from the batches up to a quarter of its largest


def main(arguments: Sequence[str] | None = None) -> None:
    """Print coverage and width of every method; with --check exit with 1 where a bar is missed."""
    chosen = _options().parse_args(arguments)
    found = curves(study(chosen.sweep))
    replicas = parts(found, chosen.runs)
    print(f"{len(found)} arms, {len(replicas)} times with {chosen.runs} runs per batch at most")
    calibrated, settings = leave_one_out(replicas, chosen.up_to, chosen.to)
    for name, own in settings.items():
        print(f"  settings for {name}, by the others: {own}")
    shipped = Calibration(tuple(with_settings(replicas, chosen.up_to, chosen.to)))
    seeds = [g for r in replicas for c in r for g in graded(c, chosen.up_to, chosen.to, by_bootstrap)]
    tables = [grade for reference in mlperf().values() for grade in _reference(reference.curve)]
    rows = {
        "settings and prior by the other arms": calibrated,
        "settings that ship, prior by the other arms": shipped,
        "seeds resampled": Calibration(tuple(seeds)),
        "MLPerf, settings that ship, no prior": Calibration(tuple(tables)),
    }
    table(
        ["intervals of 80 %", "hold", "95 %", "median width", "forecast / measured", "by curve"],
        [_row(name, each) for name, each in rows.items()],
    )
    print()
    head = ["rates beyond those fitted", "rms of log rate", "interval of 80 % holds"]
    table(head, list(_rates(found, chosen.up_to)))
    low, high = calibrated.coverage_interval()
    bars = [
        Bar("lower end of the coverage's interval", low, "<=", LEVEL),
        Bar("upper end of the coverage's interval", high, ">=", LEVEL),
        Bar("least coverage of an arm", min(calibrated.coverage_by_name.values()), ">=", 0.5),
        Bar("median width", calibrated.width, "<=", 2.5),
    ]
    check_bars(bars, chosen.check)


def _row(name: str, calibration: Calibration) -> list[str]:
    low, high = calibration.coverage_interval()
    by_name = ", ".join(f"{name} {share:.0%}" for name, share in calibration.coverage_by_name.items())
    width, bias = f"x{calibration.width:.2f}", f"{calibration.bias:.2f}"
    return [name, f"{calibration.coverage:.0%}", f"{low:.0%} to {high:.0%}", width, bias, by_name]


def _rates(found: Sequence[Curve], up_to: int) -> Iterator[list[str]]:
    """How far extrapolated rates are from the best: by the rule that fits best, and by the one that ships."""
    laws: dict[str, Callable[[Curve, Curve], RateLaw]] = {
        "the rule that fits best": lambda small, _: next(iter(small.rate_laws.values())),
        "saturating where the steps do": lambda small, whole: small.rates_beyond(
            small.forecaster(prior_of(whole, [other.up_to(up_to) for other in found]))
        ),
    }
    for name, law_of in laws.items():
        errors, held = [], []
        for curve in found:
            law = law_of(curve.up_to(up_to), curve)
            for point in curve.usable:
                if point.rate is not None and point.batch > up_to:
                    errors.append(math.log(law.rates([point.batch])[0] / point.rate))
                    low, high = law.band([point.batch], LEVEL)
                    held.append(low[0] <= point.rate <= high[0])
        rms = math.hypot(*errors) / math.sqrt(len(errors))
        yield [name, f"{rms:.2f}", f"{sum(held) / len(held):.0%}"]


def _reference(curve: Curve) -> Iterator[Grade]:
    largest = max(point.batch for point in curve.usable)
    yield from graded(
        curve,
        largest // SHARE_OF_REFERENCE,
        largest,
        lambda small, wanted: [small.forecaster().predict(batch, small.measured[2][-1]) for batch in wanted],
    )


def study(path: Path) -> Study:
    """Of a folder or a journal."""
    if path.is_dir():
        return Study.read(path)
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return Study.of(path.parent, map(json.loads, text.splitlines()))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--up-to", type=int, default=64, help="the largest batch that is fitted")
    parser.add_argument("--to", type=int, default=512, help="the largest batch that is graded")
    parser.add_argument("--runs", type=int, default=5, help="runs per batch in each repetition, at most")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    return parser


if __name__ == "__main__":
    main()

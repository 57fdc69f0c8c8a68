"""A report's parts: what is found as a title, a sentence, tables, and the figures that go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.experiments.calibration import Calibration
from cluster.experiments.curve import Curve, Point
from cluster.experiments.promises import Outcome, Promise, outcomes
from cluster.experiments.report import charts
from cluster.experiments.report.figures import Figure, short
from cluster.experiments.report.findings import Findings, references
from cluster.experiments.trials import Study

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row."""

    title: str
    header: Row
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True)
class Part:
    """One thing that a report is about. `figures` draws them, which takes seconds."""

    title: str
    about: str
    tables: tuple[Table, ...]
    figures: Callable[[], list[Figure]] = list
    points: tuple[Row, ...] = field(default=())  # for CSV, under POINTS


ECHO = "echo.factor"
POINTS = ("curve", "batch", "rate", "steps", "examples", "runs", "sd of log steps", "missed", "at the edge")


def of_sweep(study: Study) -> Part:
    """The part on a sweep."""
    findings = Findings.of(study)
    return _of(
        findings,
        [*_echo(study, findings), *_grades(findings), *graded_table(outcomes(study.folder, study.target))],
    )


def of_references() -> Part:
    """The part on MLPerf's tables."""
    findings = references()
    return _of(findings, _grades(findings))


def _of(findings: Findings, more: Sequence[Table]) -> Part:
    curves = findings.curves
    tables = [_laws(curves), _by_batch("Steps to the target", curves, _steps), _rates(curves), *more]
    rows = tuple(_point(curve, point) for curve in curves for point in curve.points)
    return Part(findings.title, findings.about, tuple(tables), lambda: charts.draw(findings), rows)


LAWS = (
    "",
    "S_min",
    "B_crit",
    "95 %",
    "log-R²",
    "fewest examples",
    "trials",
    "examples spent",
    "rate at an edge",
    "runs missed",
)


def _laws(curves: Sequence[Curve]) -> Table:
    rows = tuple(map(_law, curves))
    notes = [
        "Steps S = S_min (1 + B_crit / B). A batch of B_crit needs twice the fewest steps and twice the "
        "fewest examples."
    ]
    if any(row[-2] for row in rows):
        notes.append("At an edge: batches whose best rate is the lowest or the highest tried.")
    if any(row[-1] for row in rows):
        notes.append(
            "Missed: batches where runs fell short of the target; their steps are the median, if most came "
            "to it."
        )
    return _without_empty(Table("Laws", LAWS, rows, " ".join(notes)))


def _law(curve: Curve) -> Row:
    fitted: Row = ("", "", "", "", "")
    if law := curve.steps_law:
        low, high = law.profile_interval()
        fitted = (
            f"{law.s_min:,.0f}",
            f"{law.b_crit:,.0f}",
            f"{low:,.0f} to {high:,.0f}" if np.isfinite(high) else f"{low:,.0f} or more",
            f"{law.log_r2:.4f}",
            short(law.e_min),
        )
    return (
        curve.name,
        *fitted,
        f"{curve.trials:,}",
        short(curve.examples) if curve.examples else "",
        ", ".join(f"{point.batch:,}" for point in curve.points if point.is_edge),
        ", ".join(f"{point.batch:,}" for point in curve.points if point.failed),
    )


def _by_batch(title: str, curves: Sequence[Curve], cell: Callable[[Point], str], note: str = "") -> Table:
    batches = sorted({point.batch for curve in curves for point in curve.points})
    rows = []
    for batch in batches:
        found = [{point.batch: point for point in curve.points}.get(batch) for curve in curves]
        rows.append((f"{batch:,}", *("" if point is None else cell(point) for point in found)))
    return Table(title, ("batch", *(curve.name for curve in curves)), tuple(rows), note)


def _steps(point: Point) -> str:
    missed = f" ({point.failed} missed)" if point.failed else ""
    return f"{point.steps:,.0f}{missed}" if point.is_usable else f"{point.failed} missed"


def _rates(curves: Sequence[Curve]) -> Table:
    told = []
    for curve in curves:
        if curve.rate_laws:
            law = next(iter(curve.rate_laws.values()))
            fitted = ", ".join(f"{name} {short(value)}" for name, value in law.parameters.items())
            told.append(f"{curve.name}: {law.rule.formula} with {fitted}")
    note = f"The rule that fits best, by Akaike's criterion. {'; '.join(told)}." if told else ""
    return _by_batch("Best rates", curves, lambda point: f"{point.rate:.3g}" if point.rate else "", note)


def _echo(study: Study, findings: Findings) -> list[Table]:
    """How many fresh examples echoing saves, where the echo factor is an axis of the sweep: fresh examples
    to the target without echoes over those with them (Choi et al. 2019, arXiv:1907.05550).
    """
    factors = sorted({dict(cell.axes)[ECHO] for cell in study.best if ECHO in dict(cell.axes)})
    if len(factors) < 2 or factors[0] != 1:
        return []
    points = {(c.name, p.batch): p for c in findings.curves for p in c.usable}
    rows = []
    for (name, batch), plain in points.items():
        if f"{ECHO}=1" in name.split():
            echoed = [points.get((name.replace(f"{ECHO}=1", f"{ECHO}={f:g}"), batch)) for f in factors[1:]]
            saved = [
                f * plain.steps / e.steps if e else None for f, e in zip(factors[1:], echoed, strict=True)
            ]
            shown = ["" if value is None else f"{value:.2f}" for value in saved]
            rows.append((f"{name.replace(f' {ECHO}=1', '')}, {batch:,}", *shown))
    note = "Fresh examples to the target without echoes, over those with them: the factor would be perfect."
    header = ("", *(f"factor {factor:g}" for factor in factors[1:]))
    return [Table("Echo efficiency", header, tuple(rows), note)]


def _grades(findings: Findings) -> list[Table]:
    grades = findings.backtest
    if not grades:
        return []
    calibration = Calibration(grades)
    note = (
        f"The largest batches, forecast from the others: {sum(g.is_held for g in grades)} of "
        f"{len(grades)} intervals of 80 % held; forecasts were {calibration.bias:.2f} of what was "
        f"measured (median), the intervals x{calibration.width:.1f} wide."
    )
    rows = tuple(
        (
            f"{grade.name}, {grade.forecast.batch:,}",
            f"{grade.forecast.median:,.0f}",
            f"{grade.forecast.low:,.0f} to {grade.forecast.high:,.0f}",
            f"{grade.measured:,.0f}",
            "held" if grade.is_held else "missed",
        )
        for grade in grades
    )
    return [Table("Forecasts of its own largest batches", ("", "steps", "80 %", "measured", ""), rows, note)]


def graded_table(found: Iterable[tuple[Promise, Sequence[Outcome]]]) -> list[Table]:
    """Recommendations with the runs that grade them; no table where there are none."""
    rows = [_graded_row(promise, each) for promise, graded in found for each in graded or (None,)]
    header = ("forecast", "recipe for", "rate", "steps", "80 %", "measured", "", "seconds", "took", "run")
    return [Table("Recommendations, graded", header, tuple(rows))] if rows else []


def _graded_row(promise: Promise, graded: Outcome | None) -> Row:
    steps = promise.steps
    measured = "" if graded is None or graded.steps is None else f"{graded.steps:,.0f}"
    took = "" if graded is None or graded.seconds is None else f"{graded.seconds:.3g}"
    return (
        promise.id,
        str(promise.cell),
        f"{promise.rate:.3g}",
        f"{steps.median:,.0f}",
        f"{steps.low:,.0f} to {steps.high:,.0f}",
        measured,
        graded.verdict if graded else "not run yet",
        f"{promise.seconds.low:.2g} to {promise.seconds.high:.2g}" if promise.seconds else "",
        took,
        graded.run.name if graded else "",
    )


def _point(curve: Curve, point: Point) -> Row:
    known = point.is_usable
    sd = f"{np.std(np.log(point.runs), ddof=1):.4f}" if len(point.runs) > 1 else ""
    return (
        curve.name,
        str(point.batch),
        f"{point.rate:.6g}" if point.rate else "",
        f"{point.steps:.6g}" if known else "",
        f"{point.steps * point.batch:.6g}" if known else "",
        str(len(point.runs)),
        sd,
        str(point.failed),
        str(point.is_edge).lower(),
    )


def _without_empty(table: Table) -> Table:
    kept = [n for n in range(len(table.header)) if n == 0 or any(row[n] for row in table.rows)]
    rows = tuple(tuple(row[n] for n in kept) for row in table.rows)
    return Table(table.title, tuple(table.header[n] for n in kept), rows, table.note)

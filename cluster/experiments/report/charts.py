"""The figures of a report, one function each; a figure that has nothing to show is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from cluster.experiments.curve import Curve
from cluster.experiments.laws import geometric_mean
from cluster.experiments.report.figures import (
    COLORS,
    DASHES,
    MARKERS,
    Figure,
    batch_axis,
    drawing,
    log_axis,
    panels,
    short,
)
from cluster.experiments.report.findings import Findings
from cluster.experiments.trials import Trial

PERFECT, USELESS = 0.2, 5.0  # of B_crit: below, 20 % more examples at most; above, 20 % more steps at most
_GREY = "#666666"


def draw(findings: Findings) -> list[Figure]:
    """Every figure that the findings have data for."""
    with drawing() as make:
        drawn = (chart(findings, make) for chart in CHARTS)
        return [figure for figure in drawn if figure is not None]


def steps(findings: Findings, make: Any) -> Figure | None:
    """Steps to the target against the batch, each arm with its law."""
    curves = [curve for curve in findings.curves if curve.points]
    if not curves:
        return None
    plot, axes = panels(make, len(curves))
    figure = Figure(
        "steps",
        "Steps to the target",
        "Each dot is the geometric mean of its runs (small: the runs). The line is the law S_min (1 + "
        "B_crit / B) with its 95 % band, dashed what perfect scaling would be. White: perfect scaling "
        "within 20 %; light grey: diminishing returns; darker: within 20 % of the fewest steps. Hollow: "
        "some runs missed the target.",
        plot,
    )
    for number, (axis, curve) in enumerate(zip(axes, curves, strict=True)):
        _steps_panel(figure, axis, curve, COLORS[number % len(COLORS)])
    if findings.is_one_task:
        lows, highs = zip(*(axis.get_ylim() for axis in axes), strict=True)
        for axis in axes:
            axis.set_ylim(min(lows), max(highs))
    for axis in axes:
        log_axis(axis)
    return figure


def _steps_panel(figure: Figure, axis: Any, curve: Curve, color: str) -> None:
    batches = [point.batch for point in curve.points]
    x = np.geomspace(min(batches) / 1.4, max(batches) * 1.4, 100)
    axis.set_title(curve.name)
    axis.set_ylabel("steps")
    if law := curve.steps_law:
        low, high = law.band(x)
        axis.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
        (line,) = axis.plot(x, law.steps(x), color=color)
        low_end, high_end = law.profile_interval()
        ends = (
            f"{short(low_end)} to {short(high_end)}" if np.isfinite(high_end) else f"{short(low_end)} or more"
        )
        told = f"B_crit {short(law.b_crit)} ({ends})"
        figure.tip(line, f"S_min {short(law.s_min)}, {told}, log-R² {law.log_r2:.4f}")
        axis.text(0.97, 0.95, told, transform=axis.transAxes, ha="right", va="top", fontsize=9)
        axis.set_ylim(0.6 * min(min(p.runs) for p in curve.usable), 1.7 * law.steps(x[0]))
        axis.plot(x, law.e_min / x, color=_GREY, linestyle="--", linewidth=1, zorder=1)
        for start, shade in ((PERFECT, 0.05), (USELESS, 0.07)):
            axis.axvspan(start * law.b_crit, 1e12, color="black", alpha=shade, linewidth=0, zorder=0)
    for point in curve.points:
        axis.plot([point.batch] * len(point.runs), point.runs, ".", color=color, markersize=3, alpha=0.6)
        if point.is_usable:
            filled = color if not point.failed else "white"
            (dot,) = axis.plot(
                point.batch, point.steps, "o", color=color, markerfacecolor=filled, markeredgewidth=1.5
            )
            figure.tip(dot, _told(curve, point.batch))
    batch_axis(axis, batches)


def _told(curve: Curve, batch: int) -> str:
    point = next(point for point in curve.points if point.batch == batch)
    rate = f", rate {point.rate:.3g}" if point.rate else ""
    missed = f", {point.failed} missed the target" if point.failed else ""
    return (
        f"{curve.name}, batch {batch:,}{rate}: {point.steps:,.1f} steps, "
        f"{short(point.steps * batch)} examples ({len(point.runs)} runs{missed})"
    )


def examples(findings: Findings, make: Any) -> Figure | None:
    """Examples to the target against the batch: what a larger batch costs."""
    curves = [curve for curve in findings.curves if curve.usable]
    if not curves:
        return None
    is_relative = not findings.is_one_task
    plot = make(figsize=(7.4, 4.2))
    axis = plot.add_subplot()
    caption = "Perfect scaling is level. A batch of B_crit needs twice the fewest examples."
    figure = Figure("examples", "Examples to the target", caption, plot)
    for number, curve in enumerate(curves):
        unit = curve.steps_law.e_min if is_relative and curve.steps_law else 1.0
        scale = curve.steps_law.b_crit if is_relative and curve.steps_law else 1.0
        x = [point.batch / scale for point in curve.usable]
        y = [point.steps * point.batch / unit for point in curve.usable]
        look = _look(number)
        for point, across, up in zip(curve.usable, x, y, strict=True):
            (dot,) = axis.plot(across, up, look["marker"], color=look["color"])
            figure.tip(dot, _told(curve, point.batch))
        axis.plot(x, y, label=curve.name, **look)
    axis.set_ylabel("examples / fewest examples" if is_relative else "examples")
    log_axis(axis)
    if is_relative:
        log_axis(axis, "x")
        axis.set_xlabel("batch / B_crit")
        over = np.geomspace(0.01, 10, 100)
        axis.plot(over, 1 + over, color=_GREY, linestyle=":", label="the law, 1 + B / B_crit")
    else:
        batch_axis(axis, [point.batch for curve in curves for point in curve.usable])
    axis.legend(loc="upper left")
    return figure


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def rates(findings: Findings, make: Any) -> Figure | None:
    """Best rate against the batch, with the rules that people scale by."""
    curves = [curve for curve in findings.curves if len(curve.rate_laws) > 1]
    if not curves:
        return None
    plot, axes = panels(make, len(curves))
    caption = (
        "Solid: the rule that fits best by Akaike's criterion, with the 80 % interval of a best rate. "
        "Dashed: the square-root rule; dotted: the linear rule, both through the smallest batch. Hollow: "
        "the lowest or highest rate tried."
    )
    figure = Figure("rates", "Best learning rate", caption, plot)
    for number, (axis, curve) in enumerate(zip(axes, curves, strict=True)):
        color = COLORS[number % len(COLORS)]
        points = [point for point in curve.usable if point.rate]
        batches = [point.batch for point in points]
        x = np.geomspace(min(batches) / 1.4, max(batches) * 1.4, 100)
        best = next(iter(curve.rate_laws.values()))
        (line,) = axis.plot(x, best.rates(x), color=color)
        told = ", ".join(f"{name} {short(value)}" for name, value in best.parameters.items())
        figure.tip(line, f"{best.rule.formula}: {told}; rms of log rate {best.rms:.2f}")
        if np.all(np.isfinite(best.covariance)):
            axis.fill_between(x, *best.band(x), color=color, alpha=0.2, linewidth=0)
        first = points[0]
        for power, dashes in ((0.5, "--"), (1.0, ":")):
            rule = (first.rate or 0) * (x / first.batch) ** power
            axis.plot(x, rule, color=_GREY, linestyle=dashes, linewidth=1, zorder=1)
        for point in points:
            filled = "white" if point.is_edge else color
            (dot,) = axis.plot(point.batch, point.rate, "o", color=color, markerfacecolor=filled)
            figure.tip(dot, _told(curve, point.batch))
        tried = [point.rate or 0 for point in points]
        axis.set_ylim(min(tried) / 2.5, max(tried) * 4)
        axis.set_title(curve.name)
        axis.text(0.97, 0.05, best.rule.name, transform=axis.transAxes, ha="right", fontsize=9)
        axis.set_ylabel("rate")
        batch_axis(axis, batches)
        log_axis(axis)
    return figure


def bowls(findings: Findings, make: Any) -> Figure | None:
    """Steps against the rate, a bowl per batch."""
    tried = {(trial.cell.arm, trial.cell.axes) for trial in findings.trials}
    known = [(curve.arm, curve.axes) for curve in findings.curves]  # in the sweep's order
    arms = [*(each for each in known if each in tried), *sorted(tried.difference(known))]
    if not arms:
        return None
    plot, axes = panels(make, len(arms))
    caption = (
        "One line per batch, from light (the smallest) to dark: the geometric mean over seeds where all "
        "reached the target. Hollow triangles: rates at which trials were stopped or fell short, at the "
        "steps they had; crosses at the top: diverged."
    )
    figure = Figure("bowls", "Steps against the learning rate", caption, plot)
    for axis, (arm, values) in zip(axes, arms, strict=True):
        trials = [t for t in findings.trials if (t.cell.arm, t.cell.axes) == (arm, values)]
        _bowl_panel(figure, axis, trials)
        axis.set_title(" ".join([arm, *(f"{key}={value}" for key, value in values)]))
        axis.set_xlabel("rate")
        axis.set_ylabel("steps")
        log_axis(axis, "x")
        log_axis(axis)
    return figure


def _bowl_panel(figure: Figure, axis: Any, trials: list[Trial]) -> None:
    from matplotlib import colormaps

    batches = sorted({trial.cell.batch for trial in trials})
    shades = colormaps["viridis_r"](np.linspace(0.08, 1.0, len(batches)))
    top = 1.3 * max(trial.trained_steps for trial in trials)
    axis.set_ylim(min((trial.steps for trial in trials if trial.steps), default=1) / 2, top * 1.3)
    for batch, shade in zip(batches, shades, strict=True):
        by_rate: dict[float, list[Trial]] = {}
        for trial in sorted(trials, key=lambda trial: trial.rate):
            if trial.cell.batch == batch:
                by_rate.setdefault(trial.rate, []).append(trial)
        means = {
            rate: geometric_mean([trial.steps or 0 for trial in tried])
            for rate, tried in by_rate.items()
            if all(trial.steps is not None for trial in tried)
        }
        axis.plot(list(means), list(means.values()), color=shade, linewidth=1.2)
        for rate, tried in by_rate.items():
            where = f"batch {batch:,}, rate {rate:.3g}"
            if rate in means:
                (dot,) = axis.plot(rate, means[rate], "o", color=shade, markersize=3)
                figure.tip(dot, f"{where}: {means[rate]:,.1f} steps ({len(tried)} runs)")
                continue
            ends = Counter(trial.end for trial in tried)
            steps = max(trial.trained_steps for trial in tried)
            marker, height = ("x", top) if ends["diverged"] > len(tried) / 2 else ("^", steps)
            (dot,) = axis.plot(rate, height, marker, color=shade, markerfacecolor="none", markersize=4)
            told = ", ".join(f"{count} {end}" for end, count in ends.items())
            figure.tip(dot, f"{where}: {told}, after {steps:,} steps")
        if means and batch in (batches[0], batches[-1]):
            best = min(means, key=means.__getitem__)
            place = (best, means[best])
            axis.annotate(f"{batch:,}", place, (0, -11), textcoords="offset points", ha="center", fontsize=8)


def arms(findings: Findings, make: Any) -> Figure | None:
    """The arms beside each other at a few batches, with every run and an interval."""
    names = [curve.name for curve in findings.curves]
    known = [{point.batch: point for point in curve.usable} for curve in findings.curves]
    common = sorted(set.intersection(*(set(points) for points in known))) if known else []
    if not findings.is_one_task or len(names) < 2 or not common:
        return None
    shown = sorted({common[0], common[len(common) // 2], common[-1]})
    plot, axes = panels(make, len(shown))
    caption = (
        "Dots: runs at each arm's best rate. Bars: 95 % intervals of their geometric mean, by Student's t."
    )
    figure = Figure("arms", "Arms compared", caption, plot)
    for axis, batch in zip(axes, shown, strict=True):
        for row, points in enumerate(known):
            point, look = points[batch], _look(row)
            axis.plot(point.runs, [row] * len(point.runs), ".", color=look["color"], alpha=0.5)
            axis.plot(point.interval(), [row, row], color=look["color"], linewidth=3, alpha=0.5)
            (dot,) = axis.plot(point.steps, row, look["marker"], color=look["color"])
            figure.tip(dot, _told(findings.curves[row], batch))
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(f"batch {batch:,}")
        axis.set_xlabel("steps")
        log_axis(axis, "x")
    return figure


def cost(findings: Findings, make: Any) -> Figure | None:
    """Examples against steps: what less time costs, and the points that nothing else beats in both."""
    curves = [curve for curve in findings.curves if curve.usable]
    if not curves or not findings.is_one_task:
        return None
    plot = make(figsize=(7.4, 4.2))
    axis = plot.add_subplot()
    caption = (
        "Steps are the time where each step takes as long on more workers; examples are what is paid for. "
        "The grey line joins the points that no other beats in both."
    )
    figure = Figure("cost", "Cost against time", caption, plot)
    every = []
    for number, curve in enumerate(curves):
        look = _look(number)
        x = [point.steps for point in curve.usable]
        y = [point.steps * point.batch for point in curve.usable]
        axis.plot(x, y, label=curve.name, linewidth=1, **look)
        for point, across, up in zip(curve.usable, x, y, strict=True):
            (dot,) = axis.plot(across, up, look["marker"], color=look["color"])
            figure.tip(dot, _told(curve, point.batch))
            every.append((across, up))
    best = [p for p in every if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in every)]
    axis.plot(
        *zip(*sorted(best), strict=True), color="#bbbbbb", linewidth=6, zorder=0, solid_capstyle="round"
    )
    axis.set_xlabel("steps to the target")
    axis.set_ylabel("examples to the target")
    log_axis(axis, "x")
    log_axis(axis)
    axis.legend(loc="upper right")
    return figure


def forecasts(findings: Findings, make: Any) -> Figure | None:
    """Each forecast's interval beside what was measured."""
    grades = findings.backtest
    if not grades:
        return None
    plot = make(figsize=(7.4, 1.2 + 0.24 * len(grades)))
    axis = plot.add_subplot()
    caption = (
        "The batches beyond an eighth of the largest, forecast from the others, over what was measured. "
        "Bars: 80 % intervals; dots: medians. A bar that crosses 1 held; hollow dots did not."
    )
    figure = Figure("forecasts", "Forecasts, graded", caption, plot)
    for row, grade in enumerate(grades):
        low, middle, high = (
            value / grade.measured
            for value in (grade.forecast.low, grade.forecast.median, grade.forecast.high)
        )
        axis.plot([low, high], [row, row], color=COLORS[0], linewidth=3, alpha=0.5, solid_capstyle="butt")
        filled = COLORS[0] if grade.is_held else "white"
        (dot,) = axis.plot(middle, row, "o", color=COLORS[0], markerfacecolor=filled)
        figure.tip(dot, _graded(grade.name, grade.forecast, grade.measured))
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(grades)), [f"{grade.name}, {short(grade.forecast.batch)}" for grade in grades])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("forecast steps / measured steps")
    return figure


def _graded(name: str, forecast: Any, measured: float) -> str:
    ends = f"{forecast.low:,.0f} to {forecast.high:,.0f}"
    told = f"forecast {forecast.median:,.0f} ({ends}), measured {measured:,.0f}"
    return f"{name}, batch {forecast.batch:,}: {told}"


def noise(findings: Findings, make: Any) -> Figure | None:
    """The noise scale that trials measured against the critical batch that the sweep found."""
    rows = list(_noise_rows(findings))
    if not rows:
        return None
    plot = make(figsize=(4.6, 4.2))
    axis = plot.add_subplot()
    caption = (
        "On the line the noise scale would be the critical batch. It usually lies below, up to three times."
    )
    figure = Figure("noise", "Noise scale against critical batch", caption, plot)
    for number, (name, scale, b_crit) in enumerate(rows):
        look = _look(number)
        (dot,) = axis.plot(b_crit, scale, look["marker"], color=look["color"], label=name)
        figure.tip(dot, f"{name}: noise scale {short(scale)}, critical batch {short(b_crit)}")
    ends = [min(min(row[1:]) for row in rows) / 2, max(max(row[1:]) for row in rows) * 2]
    axis.plot(ends, ends, color=_GREY, linestyle="--", linewidth=1)
    axis.set_xlabel("critical batch")
    axis.set_ylabel("noise scale")
    log_axis(axis, "x")
    log_axis(axis)
    axis.legend()
    return figure


def _noise_rows(findings: Findings) -> Iterator[tuple[str, float, float]]:
    for curve in findings.curves:
        scales = [t.noise_scale for t in findings.trials if t.noise_scale and t.cell.arm == curve.name]
        if scales and curve.steps_law:
            yield curve.name, float(np.median(scales)), curve.steps_law.b_crit


CHARTS = (steps, examples, rates, bowls, arms, cost, forecasts, noise)

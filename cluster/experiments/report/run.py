"""The part of a report on one run: what it was, how it went, and whether it kept what was forecast for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from cluster.experiments.promises import Promise, outcomes
from cluster.experiments.report.figures import COLORS, DASHES, MARKERS, Figure, drawing, short
from cluster.experiments.report.parts import Part, Row, Table, graded_table
from cluster.experiments.trials import Study
from cluster.runs import Summary
from trainer.recipe import loader
from trainer.recipe.schema import Recipe
from trainer.run_folder import journal, layout

MOST_ROWS = 12  # of the table of evaluations


def of_run(folder: Path) -> Part:
    """The part on a run's folder."""
    recipe = loader.read(folder / layout.RECIPE)
    lines = list(journal.read(folder))
    summary = Summary.of(folder)
    steps = [line for line in lines if line["kind"] == "step"]
    evaluations = [line for line in lines if line["kind"] == "evaluation" and line["split"] == "validation"]
    tables = [
        Table("Settings", ("", ""), tuple(_settings(recipe))),
        Table("Course", ("", ""), tuple(_course(summary, steps, lines))),
        *_evaluations(evaluations),
        *_promised(folder, recipe),
    ]
    about = f"A run of the recipe {recipe.name}: {summary.status.lower()} after {summary.step:,} steps."
    return Part(folder.name, about, tuple(tables), lambda: _figures(steps, evaluations))


def _settings(recipe: Recipe) -> Iterator[Row]:
    yield "task", recipe.task.use
    yield "batch", f"{recipe.batch.size:,} in micro-batches of {recipe.batch.micro:,}"
    hyper = ", ".join(
        f"{name} {value}" for name, value in recipe.optimizer.hyper.items() if _is_number(value)
    )
    yield "optimizer", f"{recipe.optimizer.name}: {hyper}"
    yield (
        "schedule",
        f"scale {recipe.schedule.scale.rule}, warm-up {recipe.schedule.warmup or 'none'}, decay "
        f"{recipe.schedule.decay.shape}",
    )
    yield "echo", f"{recipe.echo.factor}"
    yield "length", str(recipe.train)
    yield "workers", f"{recipe.run.workers}"


def _is_number(value: Any) -> bool:
    """Numbers and lists of them; switches say little to most readers."""
    return isinstance(value, int | float | tuple) and not isinstance(value, bool)


def _course(summary: Summary, steps: list[dict[str, Any]], lines: list[dict[str, Any]]) -> Iterator[Row]:
    yield "status", summary.status
    yield "examples served", f"{summary.examples:,}, {summary.fresh:,.0f} of them fresh"
    if lines:
        yield "wall time", f"{lines[-1]['time'] - lines[0]['time']:,.1f} s"
    times = [line["step_s"] for line in steps if line["step_s"]]
    if times:
        batch = median(line["batch"] for line in steps if line["step_s"])
        yield (
            "speed",
            f"{batch / median(times):,.0f} examples/s, {1000 * median(times):,.1f} ms a step (medians)",
        )
    if target := summary.target:
        yield (
            "target",
            f"{target['metric']} reached at step {target['step']:,}, after {target['seconds']:,.1f} s",
        )
    for name, value in sorted(summary.metrics.items()):
        yield f"test {name}", f"{value:.4g}"


def _evaluations(evaluations: list[dict[str, Any]]) -> list[Table]:
    if not evaluations:
        return []
    names = list(evaluations[-1]["metrics"])
    every = -(-len(evaluations) // MOST_ROWS)
    shown = evaluations[(len(evaluations) - 1) % every :: every]  # the last one is among them
    rows = tuple(
        (
            f"{line['examples']:,}",
            f"{line['step']:,}",
            *(f"{line['metrics'].get(name, float('nan')):.4g}" for name in names),
        )
        for line in shown
    )
    return [Table("Validation", ("examples", "step", *names), rows)]


def _promised(folder: Path, recipe: Recipe) -> list[Table]:
    """Of any sweep beside the run that has forecast it."""
    found: list[tuple[Promise, list[Any]]] = []
    for sweep in filter(layout.is_sweep, layout.runs_in(folder.parent)):
        for promise, graded in outcomes(sweep, Study.read(sweep).target):
            if promise.run == recipe.name:
                found.append((promise, [each for each in graded if each.run == folder]))
    return graded_table(found)


def _figures(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[Figure]:
    if not steps:
        return []
    with drawing() as make:
        plot = make(figsize=(7.4, 4.2))
        axis = plot.add_subplot()
        caption = "The training loss of each step, and every metric of the validation split."
        figure = Figure("course", "Course", caption, plot)
        axis.plot(
            [line["examples"] for line in steps],
            [line["loss"] for line in steps],
            color="#999999",
            linewidth=0.8,
            label="training loss",
        )
        for number, name in enumerate(evaluations[-1]["metrics"] if evaluations else ()):
            look = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
            known = [line for line in evaluations if name in line["metrics"]]
            x, y = [line["examples"] for line in known], [line["metrics"][name] for line in known]
            axis.plot(
                x, y, label=f"validation {name}", linestyle=DASHES[number % len(DASHES)], markersize=4, **look
            )
        axis.set_xlabel("examples served")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_formatter(lambda value, _: short(value))
        axis.legend()
    return [figure]

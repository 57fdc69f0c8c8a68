"""What lines of a sweep's journal come to in MLflow: names, parameters, metrics. Nothing here talks to it."""

import csv
import io
from collections.abc import Iterable, Iterator
from statistics import geometric_mean
from typing import Any

from trainer.run_folder.journal import Line
from trainer.tracking.entries import Point
from trainer.tracking.metrics import Entry, points

MOST_PARAMS = 10  # of a trial: those in which trials differ
STATUS = {"stopped": "KILLED", "diverged": "FAILED"}  # what MLflow shows of a trial; all others FINISHED


def trial_key(line: Line) -> tuple[str, str]:
    """What one trial has, however often it was begun."""
    return line["key"], line["stage"]


def title(line: Line, sweep: Line) -> str:
    """A trial's name: what differs between the trials of its sweep."""
    arm = [line["arm"]] if len(sweep["arms"]) > 1 else []
    own = {"batch": line["batch"], **line["axes"], "rate": f"{line['rate']:.6g}", "seed": line["seed"]}
    stage = [line["stage"]] if line["stage"] != "search" else []
    return " ".join([*arm, *(f"{key}={value}" for key, value in own.items()), *stage])


def params(line: Line) -> dict[str, str]:
    """What differs between trials; more axes than there is room for stand together."""
    own = {name: line[name] for name in ("arm", "batch", "rate", "seed", "stage")}
    axes = line["axes"]
    if len(own) + len(axes) > MOST_PARAMS:
        axes = {"axes": " ".join(f"{key}={value}" for key, value in axes.items())}
    return {name: str(value) for name, value in (own | axes).items()}


def metrics(line: Line, sweep: Line) -> list[Point]:
    """A trial's curve, over served examples, and what came of it."""
    curve = f"validation/{sweep['target']['metric']}"
    began_at = line["time"] - line["seconds"]
    found: list[Point] = []
    for step, value in line["curve"]:
        at_s = began_at + line["seconds"] * step / max(1, line["trained_steps"])
        found += points({curve: value}, at_s, step * line["batch"])
    steps = line["steps"]
    told = {
        "feasible": float(steps is not None),
        "trained_steps": line["trained_steps"],
        "noise_scale": line.get("noise_scale"),
        **{f"test/{name}": value for name, value in line.get("test", {}).items()},
    }
    if steps is not None:
        told |= {"steps_to_target": steps, "examples_to_target": steps * line["batch"]}
        told["seconds_to_target"] = line["seconds"]
    return [*found, *points(told, line["time"], 0)]


def of_the_sweep(lines: Iterable[Line]) -> Entry:
    """What lines come to in the sweep's own run: best rates over the batch, and fits, by strand."""
    result = Entry()
    for line in lines:
        match line["kind"]:
            case "sweep":
                for name in ("arms", "batches"):
                    result.tags[f"lockstep.{name}"] = ", ".join(map(str, line[name]))
            case "best" if line["rate"] is not None:
                result.metrics += points(
                    {f"best_rate/{_strand(line)}": line["rate"]}, line["time"], line["batch"]
                )
            case "fit":
                named = {f"fit/{_strand(line)}/{name}": value for name, value in line["metrics"].items()}
                result.metrics += points(named, line["time"], 0)
            case "end":
                result.tags["lockstep.reason"] = str(line["reason"] or "")
    return result


def mean_steps(lines: Iterable[Line]) -> list[Point]:
    """The geometric mean of the steps to the target at each best rate, over the batch; trials that fell short
    are left out. All at the time of the first line, so that a mean told twice lands on itself.
    """
    lines = list(lines)
    best = {_cell(line): line["rate"] for line in lines if line["kind"] == "best"}
    reached: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        is_reported = line["kind"] == "trial" and line["stage"] == "report"
        if is_reported and line["steps"] is not None and line["rate"] == best.get(_cell(line)):
            reached.setdefault(_cell(line), []).append(line["steps"])
    means = {(strand, batch): geometric_mean(steps) for (strand, batch), steps in reached.items()}
    return [
        point
        for (strand, batch), mean in means.items()
        for point in points({f"steps_to_target/{strand}": mean}, lines[0]["time"], batch)
    ]


def table(lines: Iterable[Line]) -> str:
    """The trials of a journal as CSV, a row for each."""
    newest = {trial_key(line): line for line in lines if line["kind"] == "trial"}
    rows = [dict(_cells(line)) for line in newest.values()]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cells(line: Line) -> Iterator[tuple[str, Any]]:
    names = ("arm", "batch", "rate", "seed", "stage", "end", "steps", "trained_steps", "examples", "seconds")
    yield from ((name, line[name]) for name in names)
    yield from line["axes"].items()
    yield from ((f"test {name}", value) for name, value in line.get("test", {}).items())
    yield "noise_scale", line.get("noise_scale")


def _cell(line: Line) -> tuple[str, int]:
    return _strand(line), line["batch"]


def _strand(line: Line) -> str:
    return " ".join([line["arm"], *(f"{key} {value}" for key, value in line["axes"].items())])

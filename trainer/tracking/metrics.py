"""What lines of a journal come to in MLflow: metrics and tags. Nothing here talks to MLflow."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trainer.run_folder.journal import Line
from trainer.tracking.entries import Point
from trainer.tracking.names import LARGEST_INTEGER
from trainer.tracking.progress import TrackingProgress

UNTHINNED_STEPS = 1000  # the first steps of a run are all shown, later ones once a second
THIN_TO_S = 1.0


@dataclass
class Entry:
    """What some journal lines come to in MLflow."""

    metrics: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


def entry(lines: Iterable[Line], state: TrackingProgress) -> Entry:
    """Translate journal lines. Steps of long runs are thinned; `state` remembers how far that went."""
    result = Entry()
    for line in lines:
        match line["kind"]:
            case "start":
                own = {key: value for key, value in line.items() if key not in ("kind", "time")}
                result.tags |= {f"lockstep.{key}": str(value) for key, value in own.items()}
            case "step":
                state.steps += 1
                if state.steps <= UNTHINNED_STEPS or line["time"] - state.thinned_at >= THIN_TO_S:
                    state.thinned_at = line["time"]
                    result.metrics += points(_step_metrics(line), line["time"], line["examples"])
            case "evaluation":
                named = {f"{line['split']}/{name}": value for name, value in line["metrics"].items()}
                result.metrics += points(named, line["time"], line["examples"])
            case "execution":
                result.tags["lockstep.execution"] = line["reason"]
            case "decision":
                result.tags[f"lockstep.decision.{line['what']}"] = f"{line['value']} at {line['position']}"
            case "accepted":
                result.tags["lockstep.accepted"] = "\n".join(line["changes"])
            case "end":
                result.tags["lockstep.reason"] = str(line.get("reason") or "")
    return result


def _step_metrics(line: Line) -> dict[str, Any]:
    """A step's metrics; MLflow makes a section of all that has the same prefix, and sorts the sections."""
    names = ("loss", "learning_rate", "gradient_norm", "loss_scale", "skipped", "batch", "step", "passes")
    named = {name: line[name] for name in names if name in line}
    named |= {"served_examples": line["examples"], "fresh_examples": line["fresh"]}
    named["echoed_examples"] = line["examples"] - line["fresh"]
    if line["step_s"]:
        named["examples_per_s"] = line["batch"] / line["step_s"]
    named |= {f"time/{name}": value for name, value in line.items() if name.endswith("_s")}
    named |= {f"echo/{name}": value for name, value in line.get("echo", {}).items()}
    return {f"train/{name}": value for name, value in named.items()}


def points(named: dict[str, Any], at_s: float, step: int) -> Iterator[Point]:
    """The numbers among some values, at a time in seconds and at a step, which is mostly served examples."""
    for name, value in named.items():
        if isinstance(value, int | float):
            yield name, _drawable(value), round(at_s * 1000), min(step, LARGEST_INTEGER)


def _drawable(value: float) -> float:
    """MLflow stores infinity as the largest double, which ruins the chart: infinity becomes NaN, a gap."""
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer that no float holds
        return math.nan

"""Forecasts that were given to somebody, kept in the sweep's journal, and what became of them.

`lockstep recommend` writes one with its recipe. The recipe's name holds the forecast's id, so any run of that
name in the sweep's directory grades it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.experiments.forecast import Prediction
from cluster.experiments.trials import Cell, Target, crossing
from trainer.run_folder import journal, layout

FORECAST = "forecast"  # the kind of its line


@dataclass(frozen=True)
class Promise:
    """A forecast for one recipe. Lengths are in optimizer steps and in seconds of training."""

    id: str
    run: str  # the recipe's name
    cell: Cell
    rate: float
    steps: Prediction
    seconds: Prediction | None = None

    def fields(self) -> dict[str, Any]:
        """What the journal's line holds."""
        return {
            "id": self.id,
            "run": self.run,
            **self.cell.fields(),
            "rate": self.rate,
            "steps": asdict(self.steps),
            "seconds": None if self.seconds is None else asdict(self.seconds),
        }

    @classmethod
    def of(cls, line: dict[str, Any]) -> Promise:
        """The forecast of a journal's line."""
        seconds = line["seconds"] and Prediction(**line["seconds"])
        return cls(line["id"], line["run"], Cell.of(line), line["rate"], Prediction(**line["steps"]), seconds)


@dataclass(frozen=True)
class Outcome:
    """A run that a forecast was for. `steps` and `seconds` to the target are None where it fell short."""

    promise: Promise
    run: Path
    status: str
    steps: float | None
    seconds: float | None

    @property
    def verdict(self) -> str:
        """In a word or two: how the forecast did."""
        if self.steps is not None:
            return "held" if self.promise.steps.holds(self.steps) else "missed"
        return "target not reached" if self.status == "FINISHED" else self.status.lower()


def promises(sweep: Path) -> list[Promise]:
    """The forecasts that a sweep's journal holds."""
    found = {line["id"]: Promise.of(line) for line in journal.read(sweep) if line["kind"] == FORECAST}
    return list(found.values())


def outcomes(sweep: Path, target: Target) -> Iterator[tuple[Promise, list[Outcome]]]:
    """Every forecast of a sweep with the runs that grade it, which lie beside the sweep."""
    for promise in promises(sweep):
        runs = sorted(layout.numbered(sweep.parent, promise.run))
        yield promise, [outcome(promise, folder, target) for _, folder in runs]


def outcome(promise: Promise, run: Path, target: Target) -> Outcome:
    """What a run's journal says."""
    curve: list[tuple[int, float]] = []
    status, seconds = "running or cut off", None
    for line in journal.read(run):
        match line["kind"]:
            case "evaluation" if line["split"] == "validation" and target.metric in line["metrics"]:
                curve.append((line["step"], line["metrics"][target.metric]))
            case "rewind":
                curve = [(step, value) for step, value in curve if step <= line["step"]]
            case "target":
                seconds = line["seconds"]
            case "end":
                status = line["status"]
    return Outcome(promise, run, status, crossing(curve, target), seconds)

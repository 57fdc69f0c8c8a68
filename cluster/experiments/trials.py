"""A sweep as its journal tells it: what was tried, and what each trial brought."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.errors import UserError
from trainer.recipe.train import Target
from trainer.run_folder import journal, layout

Axes = tuple[tuple[str, Any], ...]  # further recipe keys of a sweep with the values of one cell
End = Literal["reached", "stopped", "diverged", "unreached"]
Stage = Literal["search", "report"]


@dataclass(frozen=True, order=True)
class Cell:
    """Where the best rate is searched for: one arm at one global batch, and at one value of each axis."""

    arm: str
    batch: int
    axes: Axes = ()

    def __str__(self) -> str:
        more = "".join(f" {key}={value}" for key, value in self.axes)
        return f"{self.arm} batch={self.batch}{more}"

    def fields(self) -> dict[str, Any]:
        """Its part of a journal's line."""
        return asdict(self) | {"axes": dict(self.axes)}

    @classmethod
    def of(cls, line: dict[str, Any]) -> Cell:
        """The cell of a journal's line."""
        return cls(line["arm"], line["batch"], tuple(line["axes"].items()))


@dataclass(frozen=True)
class Ask:
    """A trial that a search wants, given up after `limit` steps."""

    cell: Cell
    rate: float
    seed: int
    stage: Stage
    limit: int

    def brought(self, end: End, trained_steps: int, steps: float | None = None, **more: Any) -> Trial:
        """The trial that was asked for, with how it has ended and whatever else is known of it."""
        return Trial(
            cell=self.cell,
            rate=self.rate,
            seed=self.seed,
            stage=self.stage,
            end=end,
            steps=steps,
            trained_steps=trained_steps,
            examples=trained_steps * self.cell.batch,
            **more,
        )


@dataclass(frozen=True)
class Trial:
    """One training that has ended. Lengths are in optimizer steps and in examples served."""

    key: str  # hash of the resolved recipe
    cell: Cell
    rate: float  # peak learning rate
    seed: int
    stage: Stage
    end: End
    steps: float | None  # to the target, interpolated; None where it was not reached
    trained_steps: int
    examples: int
    seconds: float
    curve: tuple[tuple[int, float], ...] = ()  # (step, the target's metric), at most 60 points
    test: dict[str, float] = field(default_factory=dict)
    noise_scale: float | None = None

    @property
    def examples_to_target(self) -> float | None:
        """Examples served up to the target."""
        return None if self.steps is None else self.steps * self.cell.batch

    def fields(self) -> dict[str, Any]:
        """What the journal's line holds."""
        fields = asdict(self)
        del fields["cell"]
        return fields | self.cell.fields()

    @classmethod
    def of(cls, line: dict[str, Any]) -> Trial:
        """The trial of a journal's line."""
        own = {name: line[name] for name in cls.__dataclass_fields__ if name in line}
        own["curve"] = tuple((step, value) for step, value in line["curve"])
        return cls(cell=Cell.of(line), **own)


def crossing(curve: Iterable[tuple[int, float]], target: Target) -> float | None:
    """Steps at which the metric crosses the target: in logarithms of steps, a straight line between the two
    evaluations around it. None where it never does.
    """
    before: tuple[int, float] | None = None
    for step, value in curve:
        if target.reached(value):
            if before is None or not before[0] or not math.isfinite(before[1]):
                return float(step)
            share = (before[1] - target.value) / (before[1] - value)
            return math.exp(math.log(before[0]) + share * math.log(step / before[0]))
        before = step, value
    return None


@dataclass
class Study:
    """A sweep's folder, read. `best` has the rate that the search chose for each cell it has finished."""

    folder: Path
    name: str
    target: Target
    arms: tuple[str, ...]
    batches: tuple[int, ...]
    trials: list[Trial]
    best: dict[Cell, float]
    told: dict[str, Any] = field(default_factory=dict)  # the line `sweep`, as it stands

    @classmethod
    def read(cls, folder: Path) -> Study:
        """UserError where the folder holds no sweep."""
        return cls.of(folder, journal.read(folder))

    @classmethod
    def of(cls, folder: Path, lines: Iterable[dict[str, Any]]) -> Study:
        """The study that a journal's lines tell; a trial that stands there twice counts once."""
        told: dict[str, Any] | None = None
        trials: dict[tuple[str, str], Trial] = {}
        best: dict[Cell, float] = {}
        for line in lines:
            match line["kind"]:
                case "sweep":
                    told = line
                case "trial":
                    trial = Trial.of(line)
                    trials[trial.key, trial.stage] = trial
                case "best":
                    best[Cell.of(line)] = line["rate"]
        if told is None:
            raise UserError(f"{layout.relative_to_cwd(folder)}: holds no sweep; give the folder of one")
        return cls(
            folder=folder,
            name=told["name"],
            target=Target(**told["target"]),
            arms=tuple(told["arms"]),
            batches=tuple(told["batches"]),
            trials=list(trials.values()),
            best=best,
            told=told,
        )

    def at(self, cell: Cell, stage: Stage | None = None) -> list[Trial]:
        """The trials of a cell, of one stage or of all."""
        return [t for t in self.trials if t.cell == cell and (stage is None or t.stage == stage)]

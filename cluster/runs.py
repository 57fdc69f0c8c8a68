"""What the runs and sweeps in a folder are, how some runs differ, and which checkpoints can go."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.experiments.trials import Study
from trainer.errors import UserError
from trainer.recipe import loader
from trainer.run_folder import journal, layout

UNFINISHED = "running or cut off"


@dataclass
class Summary:
    """A run, as its journal tells it. Times are Unix seconds."""

    folder: Path
    began_at: float = 0.0
    status: str = UNFINISHED
    step: int = 0
    examples: int = 0
    fresh: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # of the test split at its end
    target: dict[str, Any] | None = None

    @classmethod
    def of(cls, folder: Path) -> "Summary":
        """Read a run's journal once."""
        found = cls(folder)
        for line in journal.read(folder):
            found.began_at = found.began_at or line["time"]
            match line["kind"]:
                case "step":
                    found.step, found.examples, found.fresh = line["step"], line["examples"], line["fresh"]
                case "rewind":
                    found.status, found.metrics = UNFINISHED, {}
                case "target":
                    found.target = line
                case "end":
                    found.status, found.metrics = line["status"], line["metrics"]
        return found

    def row(self) -> tuple[str, ...]:
        """The cells of its line in the list."""
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in sorted(self.metrics.items()))
        head = self.folder.name, _day(self.began_at), self.status
        return *head, f"{self.step:,}", f"{self.examples:,}", metrics


@dataclass
class SweepSummary:
    """A sweep, as its journal tells it."""

    folder: Path
    study: Study | None  # None before it has begun
    began_at: float
    status: str

    @classmethod
    def of(cls, folder: Path) -> "SweepSummary":
        """Read a sweep's journal once."""
        lines = list(journal.read(folder))
        marks = [line for line in lines if line["kind"] in ("sweep", "end")]
        has_begun = any(line["kind"] == "sweep" for line in marks)
        return cls(
            folder=folder,
            study=Study.of(folder, lines) if has_begun else None,
            began_at=lines[0]["time"] if lines else 0.0,
            status=marks[-1].get("status", UNFINISHED) if marks else UNFINISHED,
        )

    def row(self) -> tuple[str, ...]:
        """The cells of its line in the list."""
        trials = self.study.trials if self.study else []
        examples = sum(trial.examples for trial in trials)
        best = "  ".join(_fewest_steps(self.study)) if self.study else ""
        head = self.folder.name, _day(self.began_at), self.status
        return *head, f"{len(trials):,}", f"{examples:,}", best


def _fewest_steps(study: Study) -> Iterator[str]:
    """Where each arm of a sweep needs the fewest."""
    from cluster.experiments.curve import curves  # scipy is loaded for sweeps alone

    for curve in curves(study):
        if curve.usable:
            point = min(curve.usable, key=lambda each: each.steps)
            yield f"{curve.name} batch={point.batch}: {point.steps:,.0f} steps at rate {point.rate:.3g}"


def listing(directory: str) -> list[str]:
    """One line per run in `directory`, oldest first, and then one per sweep."""
    folders = layout.runs_in(directory)
    if not folders:
        raise UserError(f"{directory}: holds no run; give the folder that a recipe's checkpoint.dir names")
    runs = [Summary.of(folder) for folder in folders if not layout.is_sweep(folder)]
    sweeps = [SweepSummary.of(folder) for folder in folders if layout.is_sweep(folder)]
    return [
        *_listed(("run", "began", "status", "steps", "examples", "test"), runs),
        *([""] if runs and sweeps else []),
        *_listed(("sweep", "began", "status", "trials", "examples", "fewest steps"), sweeps),
    ]


def _listed(head: tuple[str, ...], summaries: Sequence[Summary | SweepSummary]) -> list[str]:
    rows = [summary.row() for summary in sorted(summaries, key=lambda summary: summary.began_at)]
    return _table([head, *rows]) if rows else []


def comparison(directory: str, names: Sequence[str]) -> list[str]:
    """The keys in which the recipes of some runs differ, and what came of them."""
    folders = [_run(directory, name) for name in names]
    recipes = [_recipe(folder) for folder in folders]
    keys = sorted({key for recipe in recipes for key in recipe})
    rows: list[tuple[str, ...]] = [("", *(folder.name for folder in folders))]
    rows += [
        (key, *values)
        for key in keys
        if len(set(values := [recipe.get(key, "") for recipe in recipes])) > 1 and key != "name"
    ]
    summaries = [Summary.of(folder) for folder in folders]
    rows.append(("status", *(summary.status for summary in summaries)))
    rows.append(("steps", *(f"{summary.step:,}" for summary in summaries)))
    rows.append(("examples served", *(f"{summary.examples:,}" for summary in summaries)))
    rows.append(("fresh examples", *(f"{summary.fresh:,}" for summary in summaries)))
    if any(summary.target for summary in summaries):
        rows.append(("to target", *(_to_target(summary) for summary in summaries)))
    for name in sorted({name for summary in summaries for name in summary.metrics}):
        rows.append(
            (f"test {name}", *(f"{s.metrics[name]:.4g}" if name in s.metrics else "" for s in summaries))
        )
    return _table(rows)


def prune(directory: str, names: Sequence[str]) -> list[str]:
    """Remove the checkpoints of finished runs (the named ones, or all); their model, recipe and journal
    stay.
    """
    lines = []
    everything = [folder for folder in layout.runs_in(directory) if not layout.is_sweep(folder)]
    for folder in [_run(directory, name) for name in names] or everything:
        if Summary.of(folder).status != "FINISHED":
            if names:
                raise UserError(f"{folder}: is not finished; its checkpoints are what it would go on from")
            continue
        checkpoints = folder / layout.CHECKPOINTS
        if folder.is_symlink() or checkpoints.is_symlink():
            lines.append(f"{folder.name}: its checkpoints are behind a link, and were left")
            continue
        inside = [path for path in checkpoints.rglob("*") if not path.is_symlink()]
        freed = sum(path.stat().st_size for path in inside if path.is_file())
        with layout.locked(folder):
            shutil.rmtree(checkpoints, ignore_errors=True)
        lines.append(f"{folder.name}: {freed / 1e6:,.1f} MB of checkpoints removed")
    return lines or ["no finished run has checkpoints"]


def _run(directory: str, name: str) -> Path:
    folder = layout.named(directory, name)
    if layout.is_sweep(folder):
        raise UserError(f"{name}: is a sweep; give runs (`lockstep ui {name}` compares its trials)")
    return folder


def _day(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).strftime("%Y-%m-%d %H:%M") if time_s else ""


def _recipe(folder: Path) -> dict[str, str]:
    stored = folder / layout.RECIPE
    return loader.read(stored).flat()


def _to_target(summary: Summary) -> str:
    line = summary.target
    return (
        f"{line['step']:,} steps, {line['examples']:,} examples, {line['seconds']:,.0f} s"
        if line
        else "not reached"
    )


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]

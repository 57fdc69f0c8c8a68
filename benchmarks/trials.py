"""Trials: recipes that the trainer runs one after another in this process, and what came of each.

The benchmarks that compare recipes share it. An arm is a recipe whose learning rate is still to be found:
each of its rates is tried with the tuning seeds, the one that is best on validation is run with the seeds
that are reported, and only those runs' test metrics are shown. Best is by accuracy where the task counts it,
and the loss decides where that is equal. The runs are of `run.reduction: exact`, so that a trial repeated on
the same machine gives the same figures again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trainer import task
from trainer.plan.plan import resolve
from trainer.recipe import loader as recipes
from trainer.recipe.schema import Recipe
from trainer.run_folder import journal
from trainer.worker import RunSpec, run_worker

TUNING_SEEDS = (101, 102)  # none of those reported, which count from 0
DIVERGED = {"loss": math.inf, "accuracy": 0.0}  # what a run that diverged counts as


class Point(NamedTuple):
    """One validation: updates so far, examples served so far, the metrics."""

    step: int
    examples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Result:
    """What came of one run. `failure` says why it stopped, if it did."""

    steps: int
    test: dict[str, float]
    curve: list[Point] = field(default_factory=list)
    failure: str | None = None

    @property
    def validation(self) -> dict[str, float]:
        """The metrics at the end of the run."""
        return DIVERGED if self.failure else self.curve[-1].metrics


@dataclass(frozen=True)
class Arm:
    """A way of training: a recipe's values, with the rates that are tried. Only one: it is not tuned."""

    name: str
    values: dict[str, Any]
    rates: tuple[float, ...]

    def recipe(self, rate: float, seed: int) -> str:
        """The recipe of one run, as JSON, which is YAML too."""
        optimizer = {**self.values["optimizer"], "lr": rate}
        run = {"reduction": "exact", "device": "cpu"}
        return json.dumps({**self.values, "optimizer": optimizer, "seed": seed, "run": run})


@dataclass(frozen=True)
class Tuned:
    """An arm at its best rate: its runs, and the mean validation metrics of every rate that was tried."""

    arm: Arm
    rate: float
    tried: dict[float, dict[str, float]]
    results: list[Result]

    @property
    def edge(self) -> bool:
        """Whether the best rate is the least or the greatest that was tried: a better one may lie outside."""
        return len(self.tried) > 1 and self.rate in (min(self.tried), max(self.tried))

    def test(self, metric: str) -> list[float]:
        """A test metric of each reported run."""
        return [DIVERGED[metric] if result.failure else result.test[metric] for result in self.results]

    def mean(self, metric: str) -> float:
        """The mean of a test metric over the reported runs."""
        return statistics.fmean(self.test(metric))


class Trials:
    """Runs recipes; with a folder, keeps what came of them there and runs no recipe twice."""

    def __init__(self, folder: Path | None = None) -> None:
        self.done: dict[str, Result] = {}
        self.journal: journal.Journal | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for line in journal.read(folder):
                curve = [Point(*point) for point in line["result"].pop("curve")]
                self.done[line["recipe"]] = Result(**line["result"], curve=curve)
            self.journal = journal.Journal(folder)

    def run(self, arm: Arm, rate: float, seed: int) -> Result:
        """Train to the end, or look up what came of it."""
        text = arm.recipe(rate, seed)
        if text not in self.done:
            self.done[text] = result = train(recipes.parse(text, arm.name))
            if self.journal is not None:
                self.journal.write("result", recipe=text, result=asdict(result))
            said = ", ".join(f"{name} {value:.4g}" for name, value in result.validation.items())
            print(f"{arm.name}, rate {rate:g}, seed {seed}: {said}", file=sys.stderr, flush=True)
        return self.done[text]

    def tuned(self, arm: Arm, seeds: Sequence[int], tuning_seeds: Sequence[int] = TUNING_SEEDS) -> Tuned:
        """Find an arm's rate on validation, and run it with the seeds that are reported."""
        tried = {}
        for rate in arm.rates if len(arm.rates) > 1 else ():
            ends = [self.run(arm, rate, seed).validation for seed in tuning_seeds]
            tried[rate] = {name: statistics.fmean(end[name] for end in ends) for name in ends[0]}
        best = min(tried, key=lambda rate: badness(tried[rate])) if tried else arm.rates[0]
        return Tuned(arm, best, tried, [self.run(arm, best, seed) for seed in seeds])


def badness(metrics: dict[str, float]) -> tuple[float, float]:
    """What tuning makes least: the share of errors where the task counts them, then the loss."""
    return 1 - metrics.get("accuracy", 0.0), metrics["loss"]


def train(recipe: Recipe) -> Result:
    """Run a recipe as a worker alone, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        make_task = partial(task.make, recipe.task.use, recipe.task.with_)
        outcome = run_worker(RunSpec(resolve(recipe), folder, make_task))
        lines = list(journal.read(folder))
    curve = [
        Point(line["step"], line["examples"], line["metrics"])
        for line in lines
        if line["kind"] == "evaluation" and line["split"] == "validation"
    ]
    steps = sum(line["kind"] == "step" for line in lines)
    return Result(steps, outcome.metrics, curve, outcome.reason)


def middle(rates: tuple[float, ...], count: int) -> tuple[float, ...]:
    """The `count` rates in the middle of a row of them."""
    first = (len(rates) - min(count, len(rates))) // 2
    return rates[first : first + count]


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation of shares, in percent."""
    return spread([100 * value for value in values], 2)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(map(str, row))} |")


class Bar(NamedTuple):
    """What a figure is held against."""

    what: str
    figure: float
    sign: str  # "<=" or ">="
    limit: float

    @property
    def met(self) -> bool:
        return self.figure <= self.limit if self.sign == "<=" else self.figure >= self.limit


def check_bars(bars: Sequence[Bar], strict: bool) -> None:
    """Print every bar and whether it is met; `strict`: exit with 1 where one is not."""
    print()
    for bar in bars:
        verdict = "met" if bar.met else "MISSED"
        print(f"{bar.what}: {bar.figure:.4g}, to be {bar.sign} {bar.limit:g}: {verdict}")
    if strict and not all(bar.met for bar in bars):
        raise SystemExit(1)


def draw(path: str, panels: Sequence[Callable[[Any], None]]) -> None:
    """Save a picture with one panel for each function, which is given its axes."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{path} is not drawn: install matplotlib, pip install -e '.[plots]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.6 * len(panels), 4), squeeze=False)
    for panel, place in zip(panels, axes[0], strict=True):
        panel(place)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"\ndrawn: {path}")


def options(
    description: str | None, *, name: str, runs: tuple[str, int], rates: int, length: tuple[str, int]
) -> argparse.ArgumentParser:
    """The options that every benchmark of recipes has. `runs` and `length` name those for how many runs are
    reported and how long each is, with their full sizes.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for (option, full), help_text in ((runs, "runs reported for each arm"), (length, "length of a run")):
        parser.add_argument(f"--{option}", type=int, default=full, help=help_text)
    parser.add_argument("--rates", type=int, default=rates, help="learning rates tried, for each arm")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep results there, and go on from them")
    parser.add_argument("--plot", default=f"{name}.png", metavar="FILE", help="where the picture is saved")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    return parser

"""A sweep from its plan to its last trial. The journal in its folder is the truth: each trial stands there
once it has ended, and a sweep that is resumed looks there before it trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cluster import tracking
from cluster.console import Console
from cluster.experiments import plan as plans
from cluster.experiments.course import Order
from cluster.experiments.curve import curves
from cluster.experiments.plan import SweepPlan
from cluster.experiments.search import Best, Strand, strand
from cluster.experiments.shared_data import TaskInputs
from cluster.experiments.trials import Ask, Axes, Cell, Study, Trial
from cluster.signals import Interrupted, interruptible
from trainer.errors import RecipeError, RunFailed, UserError, refuse, trace_of
from trainer.plan.plan import resolve
from trainer.plan.schedules import scaled
from trainer.recipe import loader
from trainer.recipe.schema import Recipe
from trainer.recipe.sweep import Sweep
from trainer.run_folder import layout
from trainer.run_folder.journal import Journal
from trainer.run_folder.outcome import Outcome

MAY_GROW = ("batches", "arms", "seeds", "also", "stop")  # what `extend` may change in a sweep
MAY_CHANGE = ("run",)  # what changes no trial,
CHANGES_NOTHING = ("run", "track", "checkpoint")  # and sections of the recipe that do not


class Groups(Protocol):
    """Worker groups that train trials side by side."""

    def submit(self, orders: Sequence[Order]) -> Future[list[Trial]]:
        """Train trials of one cell in a group that is free: all of them, or else the first one."""


class Lengths:
    """The steps of each cell's recipe. What the largest and the smallest batches contradict in their data is
    refused at once.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self._plan, self.inputs = plan, TaskInputs()
        batches, problems = plan.sweep.batches, []
        for arm, axes in plan.strands():
            for batch in {batches[-1], batches[0]}:
                try:
                    self.steps(Cell(arm, batch, axes))
                except RecipeError as error:
                    problems += [problem for problem in error.problems if problem not in problems]
        refuse(problems)

    def steps(self, cell: Cell) -> int:
        """The steps of a cell's recipe."""
        recipe = self._plan.recipe(cell, own_rate(self._plan.arms[cell.arm]), 0)
        return resolve(recipe, self.inputs.of(recipe)).steps


def own_rate(recipe: Recipe) -> float:
    """The peak rate of a recipe at its own batch."""
    return scaled(recipe.schedule.scale, recipe.optimizer.hyper["lr"], recipe.batch.size)


@dataclass
class _Running:
    """A strand with its round: what it asked for, and whether that is trained one by one."""

    search: Strand
    orders: list[Order] = field(default_factory=list)
    waits_for: int = 0  # answers of groups
    is_alone: bool = False


class Conductor:
    """Takes each strand from round to round. What a strand is sent depends on its own rounds alone.

    Args:
        known: trials that the journal has.
        note: called with each trial that was trained, and with each rate that was chosen.
    """

    def __init__(
        self, plan: SweepPlan, lengths: Lengths, known: Sequence[Trial], note: Callable[[Trial | Best], None]
    ) -> None:
        self.plan, self.lengths, self.note = plan, lengths, note
        self._known = {(trial.key, trial.stage): trial for trial in known}
        self._pending: dict[Future[list[Trial]], tuple[_Running, int]] = {}

    def run(self, groups: Groups) -> None:
        """Search every strand to its end."""
        for arm, axes in self.plan.strands():
            self._advance(_Running(self._strand(arm, axes)), groups)
        while self._pending:
            done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in done:
                running, asked = self._pending.pop(future)
                trials = future.result()
                for trial in trials:
                    self._known[trial.key, trial.stage] = trial
                    self.note(trial)
                running.is_alone |= len(trials) < asked
                running.waits_for -= 1
                if not running.waits_for:
                    self._advance(running, groups)

    def _strand(self, arm: str, axes: Axes) -> Strand:
        sweep, own = self.plan.sweep, self.plan.arms[arm]
        rate = own_rate(own) if sweep.rate.start == "auto" else sweep.rate.start
        return strand(
            sweep, arm, axes, (own.batch.size, rate), lambda batch: self.lengths.steps(Cell(arm, batch, axes))
        )

    def _advance(self, running: _Running, groups: Groups) -> None:
        """Go on until a round has trials that are still to be trained, or to the strand's end."""
        while not self._submit(running, groups):
            answer = [self._known[order.key, order.stage] for order in running.orders]
            try:
                item = running.search.send(answer) if answer else next(running.search)
                while isinstance(item, Best):
                    self.note(item)
                    item = next(running.search)
            except StopIteration:
                return
            running.orders = [self._order(ask) for ask in item]

    def _submit(self, running: _Running, groups: Groups) -> bool:
        """Whether anything of the round was still to be trained, and is being trained now."""
        missing = [order for order in running.orders if not self._has(order)]
        parts = [[order] for order in missing] if running.is_alone else [missing] if missing else []
        running.waits_for = len(parts)
        self._pending |= {groups.submit(part): (running, len(part)) for part in parts}
        return bool(missing)

    def _order(self, ask: Ask) -> Order:
        return Order(**vars(ask), recipe=self.plan.recipe(ask.cell, ask.rate, ask.seed))

    def _has(self, order: Order) -> bool:
        """Whether a trial is known, and was not given up earlier than it is asked for now."""
        trial = self._known.get((order.key, order.stage))
        return trial is not None and (trial.end != "stopped" or trial.trained_steps >= order.limit)


def folder_of(plan: SweepPlan, *, resume: bool, extend: bool, folder: Path | None = None) -> Path:
    """A new folder for a sweep, or the newest of its name (or `folder`) to go on in.

    Raises:
        UserError: there is none, or its sweep is another one.
    """
    directory = plan.first_recipe.checkpoint.dir
    if not (resume or extend):
        return layout.create(directory, plan.sweep.name)
    folder = folder or layout.newest(directory, plan.sweep.name)
    stored = folder / layout.SWEEP
    if not stored.is_file():
        raise UserError(f"{folder}: holds no sweep; leave --resume out to start one")
    before, now = map(_comparable, (plans.read(stored).sweep, plan.sweep))
    may_differ = (*MAY_CHANGE, *(MAY_GROW if extend else ()))
    changed = [key for key in now if before[key] != now[key] and key not in may_differ]
    if changed:
        flag, keys = "--extend" if extend else "--resume", ", ".join(changed)
        cure = (
            f"--extend may change {', '.join(MAY_GROW)}, and `lockstep resume {folder.name}` changes nothing"
        )
        raise UserError(f"{flag}: {keys}: not as in {layout.relative_to_cwd(stored)}; {cure}")
    return folder


def _comparable(sweep: Sweep) -> dict[str, object]:
    """A sweep's values without those of its recipe that change no trial."""
    values = sweep.model_dump(mode="json")
    values["recipe"] = {key: value for key, value in values["recipe"].items() if key not in CHANGES_NOTHING}
    return values


def run(
    plan: SweepPlan,
    lengths: Lengths,
    folder: Path,
    groups: Callable[[], AbstractContextManager[Groups]],
    console: Console,
) -> None:
    """Train what a sweep in a folder has not yet; its end stands in its journal, however it ends.

    Raises:
        RunFailed: a trial could not be trained.
        KeyboardInterrupt: the sweep was told to stop; it can be resumed.
    """
    with interruptible(), layout.locked(folder):
        (folder / layout.SWEEP).write_text(loader.dump(plan.sweep))
        with closing(Journal(folder)) as journal:
            journal.write("sweep", **_definition(plan))
            study = Study.read(folder)
            chosen: dict[Cell, float | None] = {**study.best}
            if study.trials:
                console.say(f"  {len(study.trials)} trials are there already")

            def note(what: Trial | Best) -> None:
                if isinstance(what, Trial):
                    journal.write("trial", **what.fields())
                    study.trials.append(what)
                    return
                if chosen.get(what.cell, math.nan) != what.rate:  # a resumed sweep chooses again
                    journal.write("best", rate=what.rate, **what.cell.fields())
                    chosen[what.cell] = what.rate
                console.say(_line(what, study))

            tracked = tracking.tracked(folder, plan.first_recipe, console)
            with tracked, _ended(folder, journal), groups() as ready:
                Conductor(plan, lengths, study.trials, note).run(ready)
                for curve in curves(Study.read(folder)):
                    journal.write("fit", arm=curve.arm, axes=dict(curve.axes), metrics=curve.fit)


def _definition(plan: SweepPlan) -> dict[str, object]:
    sweep = plan.sweep
    return {
        "name": sweep.name,
        "target": sweep.target.model_dump(mode="json", exclude={"evaluate"}),
        "arms": list(plan.arms),
        "batches": list(sweep.batches),
        "also": sweep.also,
        "carry": sweep.carry,
        "recipes": {arm: recipe.model_dump(mode="json") for arm, recipe in plan.arms.items()},
    }


def _line(best: Best, study: Study) -> str:
    """What the search says of a cell that it has finished."""
    cell, trials = best.cell, study.at(best.cell)
    cost = f"{len(trials)} trials, {sum(trial.examples for trial in trials):,} examples"
    if best.rate is None:
        return f"  {cell}: no rate reached the target in {cost}"
    return f"  {cell}: best rate {best.rate:.4g} after {cost}"


@contextmanager
def _ended(folder: Path, journal: Journal) -> Iterator[None]:
    """However the body ends, the journal has an end afterwards."""
    go_on = f"`lockstep resume {layout.relative_to_cwd(folder)}` goes on"
    try:
        yield
    except KeyboardInterrupt as interrupt:
        reason = f"{str(interrupt) or 'interrupted'}; {go_on}"
        Outcome("KILLED", reason).write(journal)
        told = interrupt.because(reason) if isinstance(interrupt, Interrupted) else KeyboardInterrupt(reason)
        raise told from None
    except UserError as error:
        Outcome("FAILED", str(error)).write(journal)
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        Outcome("FAILED", reason, trace=trace_of(error)).write(journal)
        raise RunFailed(f"{reason}; {go_on}", trace_of(error)) from error
    Outcome("FINISHED").write(journal)

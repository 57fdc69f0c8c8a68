"""The driver of a run: from the recipe's file to its end, with any launcher in between."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import mirror, tracking
from cluster.advice import how_to_go_on
from cluster.console import Console
from cluster.resume import Resumed
from cluster.signals import SAVING_S, Interrupted, Interruption, interruptible
from trainer.errors import RunFailed, UserError, first_line, trace_of
from trainer.recipe import loader
from trainer.recipe.redaction import gives_away
from trainer.recipe.schema import Recipe
from trainer.run_folder import layout
from trainer.run_folder.durable import naming
from trainer.run_folder.journal import PLANNED, Journal, Tail
from trainer.run_folder.outcome import Outcome
from trainer.tracking import address as tracking_address
from trainer.tracking import writer

if TYPE_CHECKING:
    from trainer.plan.inputs import Inputs
    from trainer.plan.plan import Plan
    from trainer.plan.provenance import Provenance
    from trainer.worker import RunSpec


@dataclass(frozen=True)
class PlannedRecipe:
    """A recipe that may run, and the seconds that it took to see that."""

    plan: "Plan"
    inputs: "Inputs"
    seconds: float

    @property
    def recipe(self) -> Recipe:
        """The recipe, resolved."""
        return self.plan.recipe


@dataclass(frozen=True)
class TrainOptions:
    """What the command line asks for that is not of the recipe."""

    resume: bool = False
    folder: Path | None = None  # of the run to resume; None: the newest of the recipe's name
    accept: tuple[str, ...] = ()  # what may differ from what the run began with: recipe, code, data
    profile: int = 0  # steps
    command: str = "lockstep resume {run}"  # what resumes the run as it was launched


@dataclass(frozen=True)
class LaunchContext:
    """A run with its folder, as the launchers know it."""

    spec: "RunSpec"
    folder: Path
    journal: Journal
    console: Console

    @property
    def recipe(self) -> Recipe:
        """What is run."""
        return self.spec.plan.recipe

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the start: waited for on the screen, then noted with the time that it took."""
        began_at = time.monotonic()
        with self.console.waiting(name):
            yield
        self.journal.write("stage", name=name, seconds=time.monotonic() - began_at)


Launcher = Callable[[LaunchContext], None]


def read(path: str, overrides: Sequence[str]) -> Recipe:
    """The recipe in a file. UserError when it is wrong, or holds a secret that would be kept with the run."""
    recipe = loader.read(path, overrides)
    refuse_secrets(recipe)
    return recipe


def refuse_secrets(recipe: Recipe) -> None:
    """UserError where a recipe holds a secret that would be kept with its run."""
    tracking_address.address(recipe.track)
    for key, value in recipe.flat().items():
        if (secret := gives_away(value)) is not None:
            cure = "let the task or its driver read it from the environment"
            raise UserError(f"{key}: holds {secret}, and recipes are kept with their runs; {cure}")


def prepare(path: str, overrides: Sequence[str], console: Console) -> PlannedRecipe:
    """Read the recipe, load its task and plan it; show the plan. UserError when anything is wrong with it."""
    began_at = time.monotonic()
    recipe = read(path, overrides)
    with console.waiting("loading the task"):
        from trainer.plan import report
        from trainer.plan.inputs import Inputs
        from trainer.plan.plan import resolve

        inputs = Inputs.of(recipe)
        plan = resolve(recipe, inputs)
    console.say("\n".join(f"  {line}" for line in report.lines(plan)))
    return PlannedRecipe(plan, inputs, time.monotonic() - began_at)


def train(
    planned: PlannedRecipe,
    launch: Launcher,
    console: Console,
    options: TrainOptions,
    *,
    keep_noise: bool = False,
) -> None:
    """Train in a new folder, or resume the newest; `keep_noise` lets only the screen reach the terminal.

    Raises:
        RunFailed: the run failed; it is marked so, and the message says why.
        KeyboardInterrupt: the run was told to stop; it is marked so, and nothing of it is left running.
    """
    from trainer.plan import provenance, report

    plan, recipe = planned.plan, planned.recipe
    origin = provenance.of(recipe, planned.inputs)
    run = _folder(recipe, origin, options)
    folder = run.folder
    with ExitStack() as stack:
        interruption = stack.enter_context(interruptible())
        stack.enter_context(layout.locked(folder))
        layout.forget_requests(folder)
        stack.enter_context(mirror.mirroring(recipe.checkpoint.mirror, folder, console))
        with naming(folder):
            (folder / layout.RECIPE).write_text(loader.dump(recipe))
            (folder / layout.PLAN).write_text("\n".join(report.lines(plan)) + "\n")
        journal = stack.enter_context(closing(Journal(folder)))
        history = journal.size
        journal.write("stage", name=PLANNED, seconds=planned.seconds)
        console.say(f"  run folder: {layout.relative_to_cwd(folder)}")
        if run.changes:
            journal.write("accepted", changes=run.changes)
            console.say("\n".join(f"  accepted: {change}" for change in run.changes))
        if run.begins_again:
            console.say("  no whole checkpoint there: the run begins again at its first step")
        stack.enter_context(tracking.tracked(folder, recipe, console))
        interruption.request = partial(_ask_to_stop, folder, history, console)
        stack.enter_context(_ended(folder, journal, interruption, options.command))
        if keep_noise:
            stack.enter_context(console.alone(folder / layout.LOG))
        stack.enter_context(console.following(folder, history, plan.served_examples))
        spec = run_spec(plan, folder, origin, options.profile)
        launch(LaunchContext(spec, folder, journal, console))


def sync(folder: Path) -> str:
    """Bring to MLflow and to the mirror what they have not got of a run or a sweep; says where MLflow has it.

    Raises:
        UserError: it is neither, or it is being trained.
        RunFailed: the tracking server or the mirror did not take it.
    """
    is_run = (folder / layout.RECIPE).is_file()
    if not is_run and not layout.is_sweep(folder):
        raise UserError(f"{folder}: is no run's folder; give one, such as runs/quickstart-001")
    folder = folder.absolute()
    logging.disable(logging.INFO)  # the making of a database is no news to the user
    address = loader.read(folder / layout.RECIPE).checkpoint.mirror if is_run else None
    with layout.locked(folder):
        if address is not None:
            with _failing_as(f"the mirror {address}"):
                mirror.Mirror(address, folder).push()
        tracker = writer.tracker(folder)
        with _failing_as("MLflow"):
            tracker.sync()
    return tracking.how_to_look(folder)


@contextmanager
def _failing_as(by: str) -> Iterator[None]:
    """What keeps somebody from taking what the body brings becomes the reason in RunFailed."""
    try:
        yield
    except Exception as error:
        raise RunFailed(f"{by} did not take it: {first_line(error)}") from error


def run_spec(plan: "Plan", folder: Path, origin: "Provenance", profile: int = 0) -> "RunSpec":
    """What the workers of a run are told."""
    from trainer import task
    from trainer.worker import RunSpec

    make_task = partial(task.make, plan.recipe.task.use, plan.recipe.task.with_)
    return RunSpec(plan, str(folder), make_task, origin, profile)


def _folder(recipe: Recipe, origin: "Provenance", options: TrainOptions) -> Resumed:
    if not options.resume:
        above = mirror.highest(recipe.checkpoint.mirror, recipe.name)
        return Resumed(layout.create(recipe.checkpoint.dir, recipe.name, above))
    from cluster import resume

    return resume.find(recipe, origin, options.accept, options.folder)


def _ask_to_stop(folder: Path, history: int, console: Console, interrupt: Interrupted) -> bool:
    """Ask what trains in a folder to save and stop, if it trains yet; the journal after `history` tells."""
    lines = Tail(folder, history).lines()
    if not any(line["kind"] == "rewind" for line in lines) or lines[-1]["kind"] == "end":
        return False
    (folder / layout.STOP).write_text(str(interrupt))
    console.say(f"{interrupt}: saving a checkpoint, for at most {SAVING_S:.0f} s")
    return True


@contextmanager
def _ended(folder: Path, journal: Journal, interruption: Interruption, resume_command: str) -> Iterator[None]:
    """However the body ends, the journal has an end afterwards; a failure is raised as RunFailed."""
    outcome = Outcome("FAILED", "the workers are gone and left no reason")
    cause: BaseException | None = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as interrupt:
        reason = str(interruption.first or interrupt) or "interrupted"
        outcome, cause = Outcome("KILLED", reason), interrupt
    except Exception as error:
        reason = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
        outcome, cause = Outcome("FAILED", reason, trace=trace_of(error)), error
    if interruption.first is not None:
        interruption.ignore()
    told = Outcome.read(folder)
    if told is None:  # the workers could not write it
        outcome.write(journal)
    outcome = told or outcome
    layout.forget_requests(folder)
    if outcome.status == "KILLED":
        reason = f"{outcome.reason}; {how_to_go_on(folder, resume_command)}"
        first = interruption.first
        raise (first.because(reason) if first else KeyboardInterrupt(reason)) from cause
    if told is None and outcome.status == "FAILED":  # nothing of the run's own that would come again
        raise RunFailed(f"{outcome.reason}; {how_to_go_on(folder, resume_command)}") from cause
    if outcome.status != "FINISHED":
        raise RunFailed(outcome.reason or "no reason is known", outcome.trace or "") from cause

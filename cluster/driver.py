"""The driver of a run: from the recipe's file to its end, whatever trains in between."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import mirror, run_folder
from cluster.console import Screen
from cluster.signals import interruptible
from trainer.errors import RunFailed, UserError
from trainer.recipe import loader as door
from trainer.recipe.schema import Recipe
from trainer.run_folder import journal as journals
from trainer.run_folder.journal import Journal, Line
from trainer.tracking import writer as tracking

if TYPE_CHECKING:
    from trainer.plan.plan import Plan
    from trainer.plan.provenance import Provenance
    from trainer.worker import RunSpec

TRACKING_PATIENCE_S = 60.0  # how long the end of a run waits for a tracking server that answers
TROUBLE_PATIENCE_S = 5.0  # and for one that does not
INTERRUPTED_PATIENCE_S = 15.0  # and when somebody waits for the prompt


@dataclass(frozen=True)
class PlannedRecipe:
    """A recipe that may run, and the seconds that it took to see that."""

    recipe: Recipe
    plan: "Plan"
    seconds: float


@dataclass(frozen=True)
class TrainOptions:
    """What the command line asks for beside the recipe."""

    resume: bool = False
    accept: tuple[str, ...] = ()  # what may differ from what the run began with: recipe, code, data
    profile: int = 0  # steps


@dataclass(frozen=True)
class LaunchContext:
    """A run with its folder, as the launchers know it."""

    order: "RunSpec"
    folder: Path
    journal: Journal
    screen: Screen

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the start: waited for on the screen, then noted with the time that it took."""
        began_at = time.monotonic()
        with self.screen.waiting(name):
            yield
        self.journal.write("stage", name=name, seconds=time.monotonic() - began_at)


def read(path: str, overrides: Sequence[str]) -> Recipe:
    """The recipe in a file. UserError when it is wrong, or holds a secret that would be kept with the run."""
    recipe = door.read(path, overrides)
    tracking.address(recipe)
    return recipe


def prepare(path: str, overrides: Sequence[str], screen: Screen) -> PlannedRecipe:
    """Read the recipe, load its task and plan it; show the plan. UserError when anything is wrong with it."""
    began_at = time.monotonic()
    recipe = read(path, overrides)
    with screen.waiting("loading the task"):
        from trainer.plan import plan as planning

        plan = planning.make(recipe)
    screen.say("\n".join(f"  {line}" for line in plan.lines()))
    return PlannedRecipe(recipe, plan, time.monotonic() - began_at)


def train(
    planned: PlannedRecipe,
    launch: Callable[[LaunchContext], None],
    screen: Screen,
    options: TrainOptions,
    *,
    keep_noise: bool = False,
) -> None:
    """Train in a new folder, or go on in the newest; `keep_noise` lets only the screen reach the terminal.

    Raises:
        RunFailed: the run failed; it is marked so, and the message says why.
        KeyboardInterrupt: the run was told to stop; it is marked so, and nothing of it is left running.
    """
    from trainer.plan import provenance

    recipe, origin = planned.recipe, provenance.of(planned.plan)
    folder, changes, begins_again = _folder(recipe, origin, options)
    with ExitStack() as stack:
        stack.enter_context(run_folder.locked(folder))
        stack.enter_context(mirror.mirroring(recipe.checkpoint.mirror, folder, screen))
        (folder / run_folder.RECIPE).write_text(door.dump(recipe))
        (folder / run_folder.PLAN).write_text("\n".join(planned.plan.lines()) + "\n")
        journal = stack.enter_context(closing(Journal(folder)))
        history = journal.size
        journal.write("stage", name="recipe and plan", seconds=planned.seconds)
        screen.say(f"  run folder: {run_folder.relative_to_cwd(folder)}")
        if changes:
            journal.write("accepted", changes=changes)
            screen.say("\n".join(f"  accepted: {change}" for change in changes))
        if begins_again:
            screen.say("  no whole checkpoint there: the run begins again at its first step")
        stack.enter_context(interruptible())
        if tracking.wanted(recipe):
            stack.enter_context(_tracked(folder, screen))
        stack.enter_context(_ended(folder, journal))
        if keep_noise:
            stack.enter_context(screen.alone(folder / run_folder.LOG))
        stack.enter_context(screen.following(folder, history, planned.plan.served_examples))
        launch(LaunchContext(order(recipe, folder, origin, options.profile), folder, journal, screen))


def sync(folder: Path) -> str:
    """Bring to MLflow and to the mirror what they have not got of a run; says where MLflow has it.

    Raises:
        UserError: it is no run, or it is being trained.
        RunFailed: the tracking server or the mirror did not take it.
    """
    if not (folder / run_folder.RECIPE).is_file():
        raise UserError(f"{folder}: is no run's folder; give one, such as runs/quickstart-001")
    folder = folder.absolute()
    logging.disable(logging.INFO)  # the making of a database is no news to the user
    address = door.read(folder / run_folder.RECIPE).checkpoint.mirror
    with run_folder.locked(folder):
        if address is not None:
            with _failing_as(f"the mirror {address}"):
                mirror.Mirror(address, folder).push()
        with _failing_as("MLflow"):
            tracking.tracker(folder).sync()
    return how_to_look(folder)


@contextmanager
def _failing_as(by: str) -> Iterator[None]:
    """What keeps somebody from taking what the body brings becomes the reason in RunFailed."""
    try:
        yield
    except Exception as error:
        first_line = f"{error}".partition("\n")[0]
        raise RunFailed(f"{by} did not take it: {type(error).__name__}: {first_line}") from error


def how_to_look(folder: Path) -> str:
    """Where MLflow has the run, and how to open it."""
    state = tracking.TrackingProgress.load(folder)
    if state is None or state.run_id is None:
        cure = f"`lockstep sync {run_folder.relative_to_cwd(folder)}` brings it there"
        return f"MLflow has nothing of {folder.name} yet; {cure}"
    if state.uri.startswith("http"):
        address = f"{state.uri}/#/experiments/{state.experiment_id}/runs/{state.run_id}"
        return f"MLflow: {folder.name} is at {address}"
    place = state.uri.removeprefix("sqlite:///")
    where = run_folder.relative_to_cwd(Path(place)) if place != state.uri else state.uri
    return f"MLflow: {folder.name} is in {where}; open it with `lockstep ui`"


def order(recipe: Recipe, folder: Path, origin: "Provenance | None" = None, profile: int = 0) -> "RunSpec":
    """What the workers of a run are told."""
    from trainer import task
    from trainer.worker import RunSpec

    make_task = partial(task.make, recipe.task.use, recipe.task.with_)
    return RunSpec(recipe, str(folder), make_task, origin or {}, profile)


def _folder(recipe: Recipe, origin: "Provenance", options: TrainOptions) -> tuple[Path, list[str], bool]:
    """The run's folder, what of a resumed run has changed, and whether that begins again."""
    if not options.resume:
        above = mirror.highest(recipe.checkpoint.mirror, recipe.name)
        return run_folder.create(recipe.checkpoint.dir, recipe.name, above), [], False
    from cluster import resume as resuming

    return resuming.find(recipe, origin, options.accept)


@contextmanager
def _ended(folder: Path, journal: Journal) -> Iterator[None]:
    """Whatever happens to the body, the journal has an end afterwards; a failure is raised as RunFailed."""
    status, reason, cause = "FAILED", "the workers are gone and left no reason", None
    try:
        yield
    except KeyboardInterrupt as interrupt:
        _write_end(folder, journal, "KILLED", str(interrupt) or "interrupted")
        raise
    except Exception as error:
        reason, cause = f"{type(error).__name__}: {error}", error
    end = _write_end(folder, journal, status, reason)
    if end["status"] == "KILLED":
        raise KeyboardInterrupt(end["reason"]) from cause
    if end["status"] != "FINISHED":
        raise RunFailed(end["reason"]) from cause


def _write_end(folder: Path, journal: Journal, status: str, reason: str) -> Line:
    """The end that the workers wrote; where they could not, it is written now."""
    end = journals.last(folder)
    if end is None or end["kind"] != "end":
        journal.write("end", status=status, reason=reason, metrics={})
        end = journals.last(folder)
    assert end is not None
    return end


@contextmanager
def _tracked(folder: Path, screen: Screen) -> Iterator[None]:
    """The process that follows the run into MLflow starts now, and has a bounded time to finish later."""
    command = [sys.executable, "-m", "trainer.tracking.writer", str(folder), str(os.getpid())]
    with open(folder / run_folder.LOG, "ab") as log:
        writer = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | tracking.QUIET_MLFLOW,
            start_new_session=True,  # Ctrl-C is not for the writer: it has the end to write
        )
    patience_s = TRACKING_PATIENCE_S
    try:
        yield
    except KeyboardInterrupt:
        patience_s = INTERRUPTED_PATIENCE_S
        raise
    finally:
        with screen.waiting("bringing the rest to MLflow"):
            is_done = _wait(writer, folder, patience_s)
        if is_done:
            screen.say(how_to_look(folder))
        else:
            trouble = (
                tracking.TrackingProgress.load(folder) or tracking.TrackingProgress("")
            ).trouble or "it takes long"
            cure = f"`lockstep sync {run_folder.relative_to_cwd(folder)}` brings the rest there later"
            screen.say(f"MLflow is behind ({trouble}); {cure}")


def _wait(writer: subprocess.Popen, folder: Path, patience_s: float) -> bool:
    """Whether the writer finished its work. One that has trouble is given less time, and stopped after it."""
    began_at = time.monotonic()
    while writer.poll() is None:
        state = tracking.TrackingProgress.load(folder)
        is_in_trouble = state is not None and state.trouble is not None
        if time.monotonic() - began_at > (TROUBLE_PATIENCE_S if is_in_trouble else patience_s):
            writer.kill()
            writer.wait()
            return False
        time.sleep(0.1)
    return writer.returncode == 0

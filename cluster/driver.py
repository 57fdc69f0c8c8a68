"""The driver of a run: from the recipe's file to its end, whatever trains in between."""

import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import run_folder
from cluster.interruption import interruptible
from cluster.screen import Screen
from trainer import door, tracking
from trainer import journal as journals
from trainer.errors import Refusal, Stopped
from trainer.journal import Journal, Line
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from trainer.plan import Plan
    from trainer.run import RunOrder

MAY_CHANGE = ("run", "track", "checkpoint")  # none of them changes what is computed
TRACKING_PATIENCE_S = 60.0  # how long the end of a run waits for a tracking server that answers
TROUBLE_PATIENCE_S = 5.0  # and for one that does not
INTERRUPTED_PATIENCE_S = 15.0  # and when somebody waits for the prompt


@dataclass(frozen=True)
class Prepared:
    """A recipe that may run, and the seconds that it took to see that."""

    recipe: Recipe
    plan: "Plan"
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run with its folder, as the launchers know it."""

    order: "RunOrder"
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
    """The recipe in a file. Refusal when it is wrong, or holds a secret that would be kept with the run."""
    recipe = door.read(path, overrides)
    tracking.address(recipe)
    return recipe


def prepare(path: str, overrides: Sequence[str], screen: Screen) -> Prepared:
    """Read the recipe, load its task and plan it; show the plan. Refusal when anything is wrong with it."""
    began_at = time.monotonic()
    recipe = read(path, overrides)
    with screen.waiting("loading the task"):
        from trainer import plan as planning

        plan = planning.make(recipe)
    screen.say("\n".join(f"  {line}" for line in plan.lines()))
    return Prepared(recipe, plan, time.monotonic() - began_at)


def train(
    prepared: Prepared,
    launch: Callable[[Run], None],
    screen: Screen,
    *,
    resume: bool = False,
    keep_noise: bool = False,
) -> None:
    """Train in a new folder, or go on in the newest; `keep_noise` lets only the screen reach the terminal.

    Raises:
        Stopped: the run failed; it is marked so, and the message says why.
        KeyboardInterrupt: the run was told to stop; it is marked so, and nothing of it is left running.
    """
    recipe = prepared.recipe
    folder = _folder(recipe, resume)
    with ExitStack() as stack:
        stack.enter_context(run_folder.claimed(folder))
        (folder / run_folder.RECIPE).write_text(door.dump(recipe))
        (folder / run_folder.PLAN).write_text("\n".join(prepared.plan.lines()) + "\n")
        journal = stack.enter_context(closing(Journal(folder)))
        history = journal.size
        journal.write("stage", name="recipe and plan", seconds=prepared.seconds)
        screen.say(f"  run folder: {near(folder)}")
        stack.enter_context(interruptible())
        if tracking.wanted(recipe):
            stack.enter_context(_tracked(folder, screen))
        stack.enter_context(_ended(folder, journal))
        if keep_noise:
            stack.enter_context(screen.alone(folder / run_folder.LOG))
        stack.enter_context(screen.following(folder, history, prepared.plan.served_examples))
        launch(Run(order(recipe, folder), folder, journal, screen))


def sync(folder: Path) -> str:
    """Bring to MLflow what it has not got of a run; says where it is. Refusal while the run is trained."""
    if not (folder / run_folder.RECIPE).is_file():
        raise Refusal(f"{folder}: is no run's folder; give one, such as runs/quickstart-001")
    folder = folder.absolute()
    logging.disable(logging.INFO)  # the making of a database is no news to the user
    with run_folder.claimed(folder):
        try:
            tracking.tracker(folder).sync()
        except Exception as error:
            first_line = f"{error}".partition("\n")[0]
            raise Stopped(f"MLflow did not take it: {type(error).__name__}: {first_line}") from error
    return how_to_look(folder)


def near(path: Path) -> Path:
    """A path as the user would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def how_to_look(folder: Path) -> str:
    """Where MLflow has the run, and how to open it."""
    state = tracking.State.load(folder)
    if state is None or state.run_id is None:
        return f"MLflow has nothing of {folder.name} yet; `lockstep sync {near(folder)}` brings it there"
    if state.uri.startswith("http"):
        address = f"{state.uri}/#/experiments/{state.experiment_id}/runs/{state.run_id}"
        return f"MLflow: {folder.name} is at {address}"
    place = state.uri.removeprefix("sqlite:///")
    where = near(Path(place)) if place != state.uri else state.uri
    return f"MLflow: {folder.name} is in {where}; open it with `lockstep ui`"


def order(recipe: Recipe, folder: Path) -> "RunOrder":
    """What the workers of a run are told."""
    from trainer import task
    from trainer.run import RunOrder

    return RunOrder(recipe, str(folder), partial(task.make, recipe.task.use, recipe.task.with_))


def _folder(recipe: Recipe, resume: bool) -> Path:
    if not resume:
        return run_folder.create(recipe.checkpoint.dir, recipe.name)
    folder = run_folder.newest(recipe.checkpoint.dir, recipe.name)
    if (end := last_line(folder)) and end["kind"] == "end" and end["status"] == "FINISHED":
        raise Refusal(f"--resume: {near(folder)} is finished; leave --resume out to start a new run")
    stored = folder / run_folder.RECIPE
    before = tracking.flat(door.parse(stored.read_text(), str(stored)).model_dump(mode="json", by_alias=True))
    now = tracking.flat(recipe.model_dump(mode="json", by_alias=True))
    changed = [
        f"{key}: is {now.get(key)}, and the run began with {before.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.partition(".")[0] not in MAY_CHANGE
    ]
    if changed:
        kept = ", ".join(MAY_CHANGE)
        raise Refusal(
            "\n".join(changed) + f"\n--resume: only {kept} may change; start a new run without --resume"
        )
    return folder


def last_line(folder: Path) -> Line | None:
    """The last line of a run's journal."""
    newest = deque(journals.read(folder), maxlen=1)
    return newest.pop() if newest else None


@contextmanager
def _ended(folder: Path, journal: Journal) -> Iterator[None]:
    """Whatever happens to the body, the journal has an end afterwards; a failure is raised as Stopped."""
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
        raise Stopped(end["reason"]) from cause


def _write_end(folder: Path, journal: Journal, status: str, reason: str) -> Line:
    """The end that the workers wrote; where they could not, it is written now."""
    end = last_line(folder)
    if end is None or end["kind"] != "end":
        journal.write("end", status=status, reason=reason, metrics={})
        end = last_line(folder)
    assert end is not None
    return end


@contextmanager
def _tracked(folder: Path, screen: Screen) -> Iterator[None]:
    """The process that follows the run into MLflow starts now, and has a bounded time to finish later."""
    command = [sys.executable, "-m", "trainer.tracking", str(folder), str(os.getpid())]
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
            trouble = (tracking.State.load(folder) or tracking.State("")).trouble or "it takes long"
            screen.say(
                f"MLflow is behind ({trouble}); `lockstep sync {near(folder)}` brings the rest there later"
            )


def _wait(writer: subprocess.Popen, folder: Path, patience_s: float) -> bool:
    """Whether the writer finished its work. One that has trouble is given less time, and stopped after it."""
    began_at = time.monotonic()
    while writer.poll() is None:
        state = tracking.State.load(folder)
        is_in_trouble = state is not None and state.trouble is not None
        if time.monotonic() - began_at > (TROUBLE_PATIENCE_S if is_in_trouble else patience_s):
            writer.kill()
            writer.wait()
            return False
        time.sleep(0.1)
    return writer.returncode == 0

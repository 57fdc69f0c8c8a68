"""The driver of a run: from the recipe's file to its end, with any launcher in between."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import mirror
from cluster.advice import how_to_go_on
from cluster.console import Console
from cluster.package import in_job
from cluster.resume import Resumed
from cluster.signals import SAVING_S, Interrupted, Interruption, interruptible, left_s
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
from trainer.tracking.progress import TrackingProgress

if TYPE_CHECKING:
    from trainer.plan.inputs import Inputs
    from trainer.plan.plan import Plan
    from trainer.plan.provenance import Provenance
    from trainer.worker import RunSpec

TRACKING_PATIENCE_S = 60.0  # how long the end of a run waits for a tracking server that answers
FAILING_PATIENCE_S = 5.0  # and for one that does not
INTERRUPTED_PATIENCE_S = 10.0  # and when somebody waits for the prompt


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
    tracking_address.address(recipe)
    for key, value in recipe.flat().items():
        if (secret := gives_away(value)) is not None:
            cure = "let the task or its driver read it from the environment"
            raise UserError(f"{key}: holds {secret}, and recipes are kept with their runs; {cure}")
    return recipe


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
        if tracking_address.wanted(recipe):
            stack.enter_context(_tracked(folder, recipe, console))
        interruption.request = partial(_ask_to_stop, folder, history, console)
        stack.enter_context(_ended(folder, journal, interruption, options.command))
        if keep_noise:
            stack.enter_context(console.alone(folder / layout.LOG))
        stack.enter_context(console.following(folder, history, plan.served_examples))
        spec = run_spec(plan, folder, origin, options.profile)
        launch(LaunchContext(spec, folder, journal, console))


def sync(folder: Path) -> str:
    """Bring to MLflow and to the mirror what they have not got of a run; says where MLflow has it.

    Raises:
        UserError: it is no run, or it is being trained.
        RunFailed: the tracking server or the mirror did not take it.
    """
    if not (folder / layout.RECIPE).is_file():
        raise UserError(f"{folder}: is no run's folder; give one, such as runs/quickstart-001")
    folder = folder.absolute()
    logging.disable(logging.INFO)  # the making of a database is no news to the user
    address = loader.read(folder / layout.RECIPE).checkpoint.mirror
    with layout.locked(folder):
        if address is not None:
            with _failing_as(f"the mirror {address}"):
                mirror.Mirror(address, folder).push()
        with _failing_as("MLflow"):
            writer.tracker(folder).sync()
    return how_to_look(folder)


@contextmanager
def _failing_as(by: str) -> Iterator[None]:
    """What keeps somebody from taking what the body brings becomes the reason in RunFailed."""
    try:
        yield
    except Exception as error:
        raise RunFailed(f"{by} did not take it: {first_line(error)}") from error


def how_to_look(folder: Path) -> str:
    """Where MLflow has the run, and how to open it."""
    progress = TrackingProgress.load(folder)
    if progress is None or progress.run_id is None:
        cure = f"`lockstep sync {layout.relative_to_cwd(folder)}` brings it there"
        return f"MLflow has nothing of {folder.name} yet; {cure}"
    if progress.uri.startswith("http"):
        address = f"{progress.uri}/#/experiments/{progress.experiment_id}/runs/{progress.run_id}"
        return f"MLflow: {folder.name} is at {address}"
    place = progress.uri.removeprefix("sqlite:///")
    where = layout.relative_to_cwd(Path(place)) if place != progress.uri else progress.uri
    is_default = progress.uri == tracking_address.resolved(None)
    option = "" if is_default else f" --uri {progress.uri}"
    return f"MLflow: {folder.name} is in {where}; open it with `lockstep ui{option}`"


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


@contextmanager
def _tracked(folder: Path, recipe: Recipe, console: Console) -> Iterator[None]:
    """The process that follows the run into MLflow starts now, and has a bounded time to finish later."""
    command = [sys.executable, "-m", "trainer.tracking.writer", str(folder), str(os.getpid())]
    with open(layout.make_private(folder / layout.LOG), "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | writer.QUIET_MLFLOW | _home_of_a_job(recipe),
            start_new_session=True,  # Ctrl-C is not for the writer: it has the end to write
        )
    over = threading.Event()
    threading.Thread(target=_say_refusal, args=(process, folder, console, over), daemon=True).start()
    patience_s = TRACKING_PATIENCE_S
    try:
        yield
    except KeyboardInterrupt as interrupt:
        patience_s = left_s(interrupt, INTERRUPTED_PATIENCE_S)
        raise
    finally:
        over.set()
        with console.waiting("bringing the rest to MLflow"):
            is_done = _wait(process, folder, patience_s)
        if is_done:
            console.say(how_to_look(folder))
            if (progress := TrackingProgress.load(folder)) and progress.note:
                console.say(f"MLflow {progress.note}")
        else:
            console.say(_behind(folder))


def _home_of_a_job(recipe: Recipe) -> dict[str, str]:
    """A job's working folder ends with it: by default its database lies with its runs."""
    if not in_job() or recipe.track.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return {}
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{Path(recipe.checkpoint.dir).absolute()}/mlflow.db"}


def _say_refusal(process: subprocess.Popen, folder: Path, console: Console, over: threading.Event) -> None:
    """Say at once when MLflow will not take the run, while it goes on."""
    while process.poll() is None and not over.wait(0.5):
        pass
    if not over.is_set() and process.returncode:
        console.say(_behind(folder))


def _behind(folder: Path) -> str:
    reason = (TrackingProgress.load(folder) or TrackingProgress("")).error or "it takes long"
    cure = f"`lockstep sync {layout.relative_to_cwd(folder)}` brings the rest there later"
    return f"MLflow is behind ({reason}); {cure}"


def _wait(process: subprocess.Popen, folder: Path, patience_s: float) -> bool:
    """Whether the tracking process finished its work. One that fails is given less time, and stopped after
    it.
    """
    began_at = time.monotonic()
    while process.poll() is None:
        progress = TrackingProgress.load(folder)
        is_failing = progress is not None and progress.error is not None
        if time.monotonic() - began_at > (FAILING_PATIENCE_S if is_failing else patience_s):
            process.kill()
            process.wait()
            return False
        time.sleep(0.1)
    return process.returncode == 0

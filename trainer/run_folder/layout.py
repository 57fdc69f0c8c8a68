"""The folder of a run, `<checkpoint.dir>/<name>-<3 digits>`: the names of its files; made, found and locked.

No other module spells out a name that stands here.
"""

import fcntl
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import UserError

RECIPE = "recipe.yaml"  # resolved, every default written out
SWEEP = "sweep.yaml"  # of a sweep's folder instead: resolved, with its recipe
REPORT, RECOMMENDED = "report.html", "recommended.yaml"  # of a sweep, where they were asked for
PLAN = "plan.txt"
JOURNAL = "journal.jsonl"
LOG = "lockstep.log"  # what workers, Ray and the tracking process print
TRACKING = "tracking.json"  # how far MLflow has the journal
MODEL, AVERAGE = "model.safetensors", "average.safetensors"  # of a finished run
PROFILE = "profile"  # a folder with the following files
TRACE, OPERATORS, MEAN_STEP = "trace.json.gz", "operators.txt", "steps.txt"
RAY = ".ray"  # a folder for the workers' meeting point
STOP = ".stop"  # while somebody asks the run to stop: why
REGROUP = ".regroup"  # while more workers wait to join the run
CHECKPOINTS = "checkpoints"  # a folder of folders, one for each
STATE, MANIFEST = "state.pt", "manifest.json"  # what a checkpoint consists of
ANY_CHECKPOINT = "step-*"
WRITING, FETCHING = ".writing-", ".fetching-"  # before the name of a checkpoint that is not whole yet
MIRRORING = ".mirroring-"  # before the name of one that is held while it is copied


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint; names sort by step."""
    return f"step-{step:08d}"


def make_private(path: Path) -> Path:
    """A file that nobody but its owner can read, made if it is not there: errors of others go to it."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    return path


def forget_requests(folder: Path) -> None:
    """Remove what asks a run to stop, as it begins and as it ends."""
    for name in (STOP, REGROUP):
        (folder / name).unlink(missing_ok=True)


def create(directory: str | Path, name: str, above: int = 0) -> Path:
    """Make the folder with the next free number `above` one. Two runs that start at once get one each."""
    parent = Path(directory).absolute()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        highest = max((number for number, _ in numbered(parent, name)), default=0)
        for number in itertools.count(max(highest, above) + 1):
            folder = parent / f"{name}-{number:03d}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise UserError(
            f"checkpoint.dir: {parent} cannot hold runs ({error.strerror}); give one that can be written to"
        ) from error
    raise AssertionError("counting has no end")


def newest(directory: str | Path, name: str) -> Path:
    """The folder with the highest number. UserError where there is none."""
    runs = sorted(numbered(Path(directory).absolute(), name))
    if not runs:
        raise UserError(
            f"--resume: {directory} holds no run of {name}; leave --resume out to start the first one"
        )
    return runs[-1][1]


def named(directory: str | Path, name: str) -> Path:
    """The folder of a run by its path, its name in `directory`, or its recipe's name there (then the newest).
    UserError where there is none.
    """
    for folder in (Path(name), Path(directory) / name):
        if (folder / RECIPE).is_file() or is_sweep(folder):
            return folder.absolute()
    newest_first = sorted(numbered(Path(directory).absolute(), name), reverse=True)
    if newest_first:
        return newest_first[0][1]
    known = ", ".join(folder.name for folder in runs_in(directory)) or "none"
    raise UserError(f"{name}: is no run in {directory}; there are {known}")


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep and not a run."""
    return (folder / SWEEP).is_file()


def runs_in(directory: str | Path) -> list[Path]:
    """The folders of the runs in `directory`, by name."""
    return sorted(path.parent for path in Path(directory).glob(f"*/{JOURNAL}") if path.is_file())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; a second one is refused. A process that dies lets go."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{folder}: is being trained by another process; wait for it or stop it first"
        ) from error
    else:
        yield
    finally:
        os.close(descriptor)


def numbered(parent: Path, name: str) -> Iterator[tuple[int, Path]]:
    """The runs of a name in a folder, with their numbers."""
    pattern = re.compile(re.escape(name) + r"-(\d{3,})")
    for path in parent.glob("*") if parent.is_dir() else ():
        if (match := pattern.fullmatch(path.name)) and path.is_dir():
            yield int(match[1]), path


def relative_to_cwd(path: Path) -> Path:
    """A path as the user would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

"""What the user can do next: the commands that messages name."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from trainer.run_folder import layout


def resume_command(path: str, overrides: Sequence[str], flags: Sequence[str] = ()) -> str:
    """What goes on with the run of a recipe, as the user types it."""
    settings = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["lockstep", "train", path, *flags, *settings, "--resume"])


def how_to_go_on(folder: Path, command: str) -> str:
    """What is there to go on from in a run's folder, and the command that does."""
    found = (folder / layout.CHECKPOINTS).glob(f"{layout.ANY_CHECKPOINT}/{layout.MANIFEST}")
    steps = [path.parent.name.rpartition("-")[2] for path in found if path.is_file()]
    newest = max((int(step) for step in steps if step.isdecimal()), default=0)
    return f"`{command}` goes on from {f'step {newest}' if newest else 'its first step'}"

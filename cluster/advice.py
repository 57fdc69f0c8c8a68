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
    saved = sorted((folder / layout.CHECKPOINTS).glob(f"{layout.ANY_CHECKPOINT}/{layout.MANIFEST}"))
    step = f"step {saved[-1].parent.name.rpartition('-')[2].lstrip('0')}" if saved else "its first step"
    return f"`{command}` goes on from {step}"

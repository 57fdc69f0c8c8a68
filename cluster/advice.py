"""What the user can do next: the commands that messages name."""

import shlex
from pathlib import Path

from trainer.run_folder import layout


def how_to_go_on(folder: Path, resume: str) -> str:
    """What there is to resume in a run's folder, and the command that does: `resume` with the run's folder
    in place of `{run}`.
    """
    found = (folder / layout.CHECKPOINTS).glob(f"{layout.ANY_CHECKPOINT}/{layout.MANIFEST}")
    steps = [path.parent.name.rpartition("-")[2] for path in found if path.is_file()]
    newest = max((int(step) for step in steps if step.isdecimal()), default=0)
    command = resume.format(run=shlex.quote(str(layout.relative_to_cwd(folder))))
    return f"`{command}` goes on from {f'step {newest}' if newest else 'its first step'}"

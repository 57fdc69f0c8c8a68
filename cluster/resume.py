"""Which run is resumed, and whether it still is what it was: its recipe, its code and its data."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from cluster import mirror
from trainer.errors import UserError
from trainer.plan import provenance
from trainer.plan.provenance import Provenance
from trainer.recipe import loader
from trainer.recipe.schema import Recipe
from trainer.run_folder import layout
from trainer.run_folder.checkpoints import Checkpoints, manifest
from trainer.run_folder.outcome import Outcome

MAY_CHANGE = ("run", "track", "checkpoint")  # none of them changes what is computed
MUST_STAY = ("name", "seed", "task.use", "init", "batch.micro", "batch.lanes", "optimizer.name", "echo")
"""A checkpoint's numbers mean something else under other values: its place in the data, its state."""
MOST_SHOWN = 12


class Resumed(NamedTuple):
    """A run's folder, new or resumed."""

    folder: Path
    changes: Collection[str] = ()  # how it differs from what it was, where that is accepted
    begins_again: bool = False  # for want of a whole checkpoint


def find(recipe: Recipe, now: Provenance, accepted: Collection[str], folder: Path | None = None) -> Resumed:
    """The run in a folder, or the newest of the recipe's name.

    Raises:
        UserError: there is none, it is finished, or it differs in what is not accepted.
    """
    if folder is None:
        if recipe.checkpoint.mirror is not None:
            mirror.fetch(recipe.checkpoint.mirror, Path(recipe.checkpoint.dir), recipe.name)
        folder = layout.newest(recipe.checkpoint.dir, recipe.name)
    if (outcome := Outcome.read(folder)) and outcome.status == "FINISHED":
        raise UserError(
            f"--resume: {layout.relative_to_cwd(folder)} is finished; start a new one with `lockstep train`"
        )
    changed = {"recipe": _recipe_changes(folder, recipe)}
    newest = Checkpoints(folder / layout.CHECKPOINTS, keep=1).newest_whole()
    before = manifest(newest) if newest else {}
    for what in ("code", "data"):
        changed[what] = provenance.differences(before, now, what)
    refused = {what: lines for what, lines in changed.items() if lines and what not in accepted}
    if refused:
        flags = " ".join(f"--accept {what}" for what in refused)
        own = f"`lockstep resume {layout.relative_to_cwd(folder)}` takes the run's own recipe"
        cure = f"--resume: continues what the run began with; {own}, {flags} resumes all the same"
        raise UserError("\n".join([*_shortened(refused.values()), cure]))
    return Resumed(folder, _shortened(changed.values()), newest is None)


def _recipe_changes(folder: Path, recipe: Recipe) -> list[str]:
    """A line per key with another value; UserError for those under which no checkpoint can be resumed."""
    stored = folder / layout.RECIPE
    before, now = loader.read(stored).flat(), recipe.flat()
    changed = {
        key: f"{key}: is {now.get(key)}, and the run began with {before.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.partition(".")[0] not in MAY_CHANGE
    }
    lost = [line for key, line in changed.items() if f"{key}.".startswith(tuple(f"{k}." for k in MUST_STAY))]
    if lost:
        cure = "--resume: a checkpoint means nothing under these; start a new run without --resume"
        raise UserError(
            "\n".join([*lost, f"{cure}, from its weights with init.from={folder.name} if you like"])
        )
    return list(changed.values())


def _shortened(groups: Iterable[list[str]]) -> list[str]:
    shown = []
    for lines in groups:
        more = [f"and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
        shown += lines[:MOST_SHOWN] + more
    return shown

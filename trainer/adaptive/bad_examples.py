"""Bad examples that were left out: told once, counted over all workers, and limited in number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_echo import Preparer
from trainer.distributed.group import WorkerGroup
from trainer.errors import RunFailed


class SkippedExamples:
    """The examples that could not be prepared and that another one stood in for; more than `most` stop the
    run. `write` adds a line of a kind to the journal.
    """

    def __init__(self, most: int, preparer: Preparer, group: WorkerGroup, write: Callable[..., Any]):
        self.most, self.preparer, self.group, self.write = most, preparer, group, write
        self.known: dict[tuple[str, int], str] = {}  # (split, index) of each, and what was wrong with it

    def after_step(self) -> None:
        """Gather what is new on any worker. Raises RunFailed, on all of them, when there are too many."""
        if not self.most:  # then the first bad example has stopped the run
            return
        skipped = self.preparer.stats.skipped
        mine = {key: str(error) for key, error in skipped.items() if key not in self.known}
        for found in self.group.all_gather(mine):
            for (split, index), reason in found.items():
                if (split, index) not in self.known:
                    self.write("skipped", split=split, index=index, reason=reason)
            self.known |= found
        if len(self.known) > self.most:
            raise RunFailed(
                f"{len(self.known)} bad examples were left out, and task.skip_bad allows {self.most}; "
                f"the last: {next(reversed(self.known.values()))}"
            )

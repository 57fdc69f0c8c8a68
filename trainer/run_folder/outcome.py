"""How a run ended, as the last line of its journal tells it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.run_folder import journal
from trainer.run_folder.journal import Journal

PAUSED = "PAUSED"  # of a run that goes on from its last checkpoint at once, with other workers: no end


@dataclass(frozen=True)
class Outcome:
    """FINISHED with the metrics of the test split; FAILED or KILLED with the reason, and the traceback."""

    status: str
    reason: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    trace: str | None = field(default=None, compare=False)

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """The outcome of the run in a folder; None while it goes on, or where it was cut off."""
        line = journal.last(folder)
        if line is None or line["kind"] != "end":
            return None
        return cls(line["status"], line["reason"], line["metrics"], line.get("trace"))

    def write(self, to: Journal) -> None:
        """End the journal with it."""
        to.write("end", **asdict(self))

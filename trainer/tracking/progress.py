"""How far a run has been brought into MLflow, kept in its folder."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from trainer.run_folder.layout import TRACKING


@dataclass
class TrackingProgress:
    """How far a run has been tracked; kept in its folder."""

    uri: str  # as it may be shown
    run_id: str | None = None
    offset: int = 0  # bytes of the journal that MLflow has
    experiment_id: str | None = None
    described: bool = False  # parameters, recipe and environment are there
    steps: int = 0  # step lines seen
    thinned_at: float = 0.0  # time of the last step that was logged
    error: str | None = None  # what MLflow does not take, while it does not

    @classmethod
    def load(cls, folder: Path) -> "TrackingProgress | None":
        """What a run folder has of it; None when nothing was tracked yet."""
        try:
            told = json.loads((folder / TRACKING).read_text())
        except FileNotFoundError:
            return None
        return cls(**{field.name: told[field.name] for field in fields(cls) if field.name in told})

    def save(self, folder: Path) -> None:
        """Replace it in the run folder, at once or not at all."""
        draft = folder / f".{TRACKING}"
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(folder / TRACKING)

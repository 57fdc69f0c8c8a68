"""How far a run has been brought into MLflow, kept in its folder."""

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trainer.recipe.redaction import hidden_in
from trainer.run_folder.durable import naming
from trainer.run_folder.layout import TRACKING, make_private

logger = logging.getLogger("lockstep.tracking")
_TEXT_OR_NONE = (str, type(None))
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("run_id", "experiment_id", "note", "error"), _TEXT_OR_NONE),
    "uri": str,
    "offset": int,
    "described": bool,
    "steps": int,
    "thinned_at": (int, float),
}


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
    note: str | None = None  # what could not be brought there, for the user
    error: str | None = None  # what MLflow does not take, while it does not

    @classmethod
    def load(cls, folder: Path) -> "TrackingProgress | None":
        """What a run folder has of it; None when nothing was tracked yet."""
        try:
            told = json.loads((folder / TRACKING).read_text())
            known = {field.name: told[field.name] for field in fields(cls) if field.name in told}
            wrong = [name for name, value in known.items() if not isinstance(value, _TYPES[name])]
            if wrong or known["offset"] < 0:
                raise ValueError(f"{wrong}")
            return cls(**known)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            logger.warning("%s is damaged: what MLflow has is found out anew", folder / TRACKING)
            return None

    def save(self, folder: Path) -> None:
        """Replace it in the run folder, at once or not at all."""
        draft = folder / f".{TRACKING}"
        with naming(draft):
            make_private(draft).write_text(json.dumps(hidden_in(asdict(self))))
        draft.replace(folder / TRACKING)

"""Where MLflow is: the address of a run, without passwords in anything that is kept or shown."""

import importlib.util
import os
from pathlib import Path

from trainer.errors import UserError
from trainer.recipe.redaction import HIDDEN, gives_away, hidden
from trainer.recipe.schema import TrackSection

SQLITE = "sqlite:///"
NOWHERE = "none"  # the address of a run that is not tracked, unless `lockstep sync` is asked for


def wanted(track: TrackSection) -> bool:
    """Whether a run is to be tracked: MLflow is installed and `track.uri` is not "none"."""
    return track.uri != NOWHERE and importlib.util.find_spec("mlflow") is not None


def address(track: TrackSection, remembered: str | None = None) -> str:
    """A recipe's tracking address: its own, else MLFLOW_TRACKING_URI's, else the database that the run
    `remembered`, if it is still there, else SQLite in the working folder.

    Raises:
        UserError: the recipe's address holds a password; recipes are stored with runs and logged.
    """
    if track.uri and (secret := gives_away(track.uri)):
        raise UserError(
            f"track.uri: holds {secret}, and recipes are kept with their runs; set MLFLOW_TRACKING_URI, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, in the environment"
        )
    file = Path((remembered or "").removeprefix(SQLITE))
    is_there = remembered is not None and remembered.startswith(SQLITE) and file.is_file()
    own = track.uri if track.uri != NOWHERE else None
    return resolved(own or os.environ.get("MLFLOW_TRACKING_URI") or (remembered if is_there else None))


def resolved(uri: str | None) -> str:
    """An address as it is, or the default one; a database file with its whole path."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    file = uri.removeprefix(SQLITE)
    return f"{SQLITE}{Path(file).absolute()}" if file != uri else uri


def shown(uri: str) -> str:
    """An address without the user's name, password and tokens in it."""
    return hidden(uri).replace(f"{HIDDEN}@", "")

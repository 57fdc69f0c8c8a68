"""MLflow's database, where there is none yet: made in memory, then put in its place.

MLflow makes one by some seventy migrations, each of which waits several times for the disk: seconds on many
disks, less than one in memory.
"""

import contextlib
import os
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

from trainer.tracking.address import SQLITE


def make(uri: str) -> None:
    """Put a new database at the address of an SQLite file that is not there; what is there stays as it is.

    It appears whole or not at all. Where that cannot be done, MLflow makes one in its own way.
    """
    file = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or "?" in uri or file.exists():
        return
    from mlflow import MlflowClient

    memory = f"file:{uuid.uuid4().hex}?mode=memory&cache=shared"
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError, sqlite3.Error), closing(sqlite3.connect(memory, uri=True)) as kept:
        MlflowClient(f"{SQLITE}{memory}&uri=true")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "wb") as copy:
                copy.write(kept.serialize())
                copy.flush()
                os.fsync(copy.fileno())
            os.link(draft, file)  # which fails where another process was quicker
        finally:
            draft.unlink(missing_ok=True)

"""What can go wrong with data, said so that it can be put right."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Collection
from pathlib import Path

_OURS = tuple(
    f"{Path(__file__).resolve().parents[1] / name}{os.sep}"
    for name in ("cluster", "data_echo", "optim", "trainer")
)
_STANDARD = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))


class DataError(Exception):
    """The package's one exception type: `<where>: <key>: <what is wrong>; <what would be right>`.

    Attributes:
        trace: the traceback of the error behind it, as text; it travels between processes.
    """

    trace = ""

    @property
    def wrong(self) -> str:
        """What is wrong, with its place."""
        return str(self).rpartition("; ")[0] or str(self)

    @property
    def right(self) -> str:
        """What would be right; empty where the message does not say."""
        return str(self).rpartition("; ")[2] if "; " in str(self) else ""


class ExampleError(DataError):
    """One example could not be read or prepared.

    Attributes:
        split, index: which example.
        origin: where it comes from (`file:row`), as its source says; empty when the source does not.
        cause: the error it raised, as text, so that it travels between processes whatever was raised.
    """

    def __init__(self, split: str, index: int, origin: str, cause: str) -> None:
        super().__init__(split, index, origin, cause)
        self.split = split
        self.index = index
        self.origin = origin
        self.cause = cause

    def __str__(self) -> str:
        place = f" ({self.origin})" if self.origin else ""
        return f"{self.split}: example {self.index}{place}: {self.cause}; repair or remove it"


def users_line(error: BaseException, own: Collection[str] = ()) -> str:
    """`file:line` of the innermost line of the user's own code that an error came from; empty where there is
    none. `own` files are the user's wherever they lie; others unless they are installed, Python's or ours.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in own or not _is_foreign(frame.filename):
            return f"{relative(frame.filename)}:{frame.lineno}"
    return ""


def relative(file: str) -> str:
    """A file as it is called from the working folder, if it lies there."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


def _is_foreign(file: str) -> bool:
    parts = Path(file).parts
    installed = "site-packages" in parts or "dist-packages" in parts or file.startswith("<")
    return installed or file.startswith(_OURS) or file.startswith(_STANDARD)

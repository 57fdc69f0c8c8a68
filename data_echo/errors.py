"""Errors of data, each naming the place, the problem and the cure."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

_OURS = tuple(
    f"{Path(__file__).resolve().parents[1] / name}{os.sep}"
    for name in ("cluster", "data_echo", "optim", "trainer")
)
_STANDARD = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))


class DataError(Exception):
    """The package's exception, with the message `<where>: <key>: <what is wrong>; <what would be right>`.


    Attributes:
        wrong, right: the two halves of the message.
        trace: the traceback of the error behind it, as text, so that it can be sent between processes.
    """

    trace = ""

    def __init__(self, wrong: str, right: str) -> None:
        super().__init__(wrong, right)
        self.wrong = wrong
        self.right = right

    def __str__(self) -> str:
        return f"{self.wrong}; {self.right}"


class ExampleError(DataError):
    """One example could not be read or prepared.

    Attributes:
        split, index: which example.
        origin: `file:row` or the like, from its source; empty when the source has no `origin`.
        cause: the error it raised, as text, so that any error can be sent between processes.
    """

    def __init__(self, split: str, index: int, origin: str, cause: str) -> None:
        place = f" ({origin})" if origin else ""
        super().__init__(f"{split}: example {index}{place}: {cause}", "repair or remove it")
        self.split = split
        self.index = index
        self.origin = origin
        self.cause = cause

    def __reduce__(self) -> tuple[type[ExampleError], tuple[str, int, str, str], dict[str, Any]]:
        return type(self), (self.split, self.index, self.origin, self.cause), self.__dict__


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

"""What can be wrong with a run, and how it is said.

The form is `<where>: <key>: <what is wrong, with the value>; <what would be right>`.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class UserError(Exception):
    """The user's own mistake, found before anything starts: only the message is shown, the exit code is 2."""


class RunFailed(Exception):  # noqa: N818
    """A run that stops for a reason found later: it is marked FAILED with the reason, the exit code is 1.

    Attributes:
        trace: the traceback of the error behind it, as text; it travels between processes.
    """

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(reason)
        self.trace = trace


class TaskError(RunFailed):
    """What went wrong in a method of the user's task, in the two halves of every message, with its place."""

    def __init__(self, wrong: str, right: str, trace: str = "") -> None:
        super().__init__(f"{wrong}; {right}", trace)
        self.wrong, self.right = wrong, right

    def __reduce__(self) -> Any:
        return type(self), (self.wrong, self.right, self.trace)


class RunStopped(Exception):  # noqa: N818
    """A run that somebody asked to stop, after the checkpoint that it goes on from; marked KILLED."""


class RunPaused(Exception):  # noqa: N818
    """A run that is to go on at once from its last checkpoint, with other workers."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe. `file` and `line` are None where no file is behind it."""

    file: str | None
    line: int | None
    key: str
    wrong: str
    right: str

    def __str__(self) -> str:
        place = [self.file, self.line] if self.file else []
        where = ":".join(str(part) for part in place if part is not None)
        said = ": ".join(part for part in (where, self.key, f"{self.wrong}; {self.right}") if part)
        return " ".join(said.splitlines())  # whatever a value holds


class RecipeError(UserError):
    """Everything that is wrong with a recipe, at once; `str()` gives one line per problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class InvalidValueError(ValueError):
    """A value that a task refuses, in the two halves of every message."""

    def __init__(self, wrong: str, right: str) -> None:
        super().__init__(wrong, right)
        self.wrong, self.right = wrong, right

    def __str__(self) -> str:
        return f"{self.wrong}; {self.right}"


def first_line(error: BaseException) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def trace_of(error: BaseException) -> str:
    """The traceback of the error behind a failure, as text: the one that it carries, or its own."""
    return getattr(error, "trace", "") or "".join(traceback.format_exception(error))


def with_advice(error: BaseException, right: str) -> tuple[str, str]:
    """What is wrong and what would be right, as an error tells them (`wrong` and `right`: InvalidValueError,
    data_echo.DataError, those of optim); of any other error its text and the given `right`.
    """
    return getattr(error, "wrong", str(error)), getattr(error, "right", "") or right


def refuse(problems: Sequence[Problem]) -> None:
    """Raise RecipeError if there are any problems."""
    if problems:
        raise RecipeError(problems)

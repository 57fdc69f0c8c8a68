"""What can be wrong with a run, and how it is said.

The form is `<where>: <key>: <what is wrong, with the value>; <what would be right>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class UserError(Exception):
    """The user's own mistake, found before anything starts: only the message is shown, the exit code is 2."""


class RunFailed(Exception):  # noqa: N818
    """A run that stops for a reason found later: it is marked FAILED with the reason, the exit code is 1."""


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
        return ": ".join(part for part in (where, self.key, f"{self.wrong}; {self.right}") if part)


class RecipeError(UserError):
    """Everything that is wrong with a recipe, at once; `str()` gives one line per problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))

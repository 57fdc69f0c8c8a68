"""Errors of data, each naming the place, the problem and the cure."""

from __future__ import annotations


class DataError(Exception):
    """The package's exception, with the message `<where>: <key>: <what is wrong>; <what would be right>`.

    Attributes:
        wrong, right: the two halves of the message.
    """

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

    def __reduce__(self) -> tuple[type[ExampleError], tuple[str, int, str, str]]:
        return type(self), (self.split, self.index, self.origin, self.cause)

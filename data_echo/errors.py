"""Errors of data, each naming the place, the problem and the cure."""

from __future__ import annotations


class DataError(Exception):
    """The package's exception, with the message `<where>: <key>: <what is wrong>; <what would be right>`."""


class ExampleError(DataError):
    """One example could not be read or prepared.

    Attributes:
        split, index: which example.
        origin: `file:row` or the like, from its source; empty when the source has no `origin`.
        cause: the error it raised, as text, so that any error can be sent between processes.
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

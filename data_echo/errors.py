"""What can go wrong with data, said so that it can be put right."""

from __future__ import annotations


class DataError(Exception):
    """The package's one exception type: `<where>: <key>: <what is wrong>; <what would be right>`."""

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

"""Text files as windows of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_echo.errors import DataError
from data_echo.sources.files import FileSet, RangeReader
from data_echo.sources.skipped import skipped_line

_HASHED_AT_ONCE = 2**24  # bytes


class TextSource:
    """Windows of `window` successive bytes, one starting every `stride` bytes; none crosses a file's end.

    An example is {"bytes": uint8 [window]}. Files are read window by window, never whole.

    Args:
        files: a folder of .txt files, a pattern, a file, or several.
        window: bytes of an example; for predicting the next byte, one more than the model's input.
        stride: bytes from the start of a window to that of the next; None: the windows are adjacent.
        cache_bytes: the most bytes fetched from an address that are kept in memory.

    Attributes:
        skipped: lines on the files that were left out: hidden ones, and those shorter than a window.

    Raises:
        DataError: there is no such file, or none that holds a window.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        window: int,
        stride: int | None = None,
        *,
        cache_bytes: int = 2**30,
    ) -> None:
        if window < 1 or (stride is not None and stride < 1):
            raise DataError(f"text: window: {window} bytes every {stride}", "at least 1")
        self._files = FileSet(files, ".txt")
        self._reader = RangeReader(self._files, cache_bytes)
        self._window = window
        self._stride = stride or window
        self._sizes = [self._files.size(name) for name in self._files.names]
        self._counts = [max(0, (size - window) // self._stride + 1) for size in self._sizes]
        self._ends = np.cumsum(self._counts)
        if not len(self):
            raise DataError(
                f"text: window: {window} bytes, but the longest file has {max(self._sizes)}", "at most that"
            )
        short = [name for name, count in zip(self._files.names, self._counts, strict=True) if not count]
        self.skipped = self._files.skipped + skipped_line("files shorter than a window", short)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, first = self._place(index)
        data = self._reader.read(self._files.names[file], first, self._window)
        return {"bytes": np.frombuffer(data, np.uint8)}

    def origin(self, index: int) -> str:
        """`file:first byte` of a window."""
        file, first = self._place(index)
        return f"{self._files.names[file]}:{first}"

    def fingerprint(self) -> dict[str, Any]:
        """Files with sizes and windows, and a hash of all bytes."""
        digest = hashlib.sha256(f"{self._window} {self._stride}".encode())
        for name in self._files.names:
            with self._files.open(name) as file:
                while data := file.read(_HASHED_AT_ONCE):
                    digest.update(data)
        return {"files": self._files.described(self._counts), "rows": len(self), "hash": digest.hexdigest()}

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"text: window {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, (index - int(self._ends[file]) + self._counts[file]) * self._stride

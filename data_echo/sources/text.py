"""Text files as windows of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_echo.errors import DataError
from data_echo.sources.files import FileSet


class TextSource:
    """Windows of `window` successive bytes, one starting every `stride` bytes; none crosses a file's end.

    An example is {"bytes": uint8 [window]}. Local files are mapped into memory, never read whole.

    Args:
        files: a folder of .txt files, a pattern, a file, or several.
        window: bytes of an example; for predicting the next byte, one more than the model's input.
        stride: bytes from the start of a window to that of the next; None: the windows are adjacent.

    Raises:
        DataError: there is no such file, or none that holds a window.
    """

    def __init__(
        self, files: str | Path | Sequence[str | Path], window: int, stride: int | None = None
    ) -> None:
        if window < 1 or (stride is not None and stride < 1):
            raise DataError(f"text: window: {window} bytes every {stride}", "at least 1")
        self._files = FileSet(files, ".txt")
        self._window = window
        self._stride = stride or window
        self._texts = [self._mapped(name) for name in self._files.names]
        self._counts = [max(0, (len(text) - window) // self._stride + 1) for text in self._texts]
        self._ends = np.cumsum(self._counts)
        if not len(self):
            longest = max(len(text) for text in self._texts)
            raise DataError(
                f"text: window: {window} bytes, but the longest file has {longest}", "at most that"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, first = self._place(index)
        return {"bytes": np.asarray(self._texts[file][first : first + self._window])}

    def origin(self, index: int) -> str:
        """`file:first byte` of a window."""
        file, first = self._place(index)
        return f"{self._files.names[file]}:{first}"

    def fingerprint(self) -> dict[str, Any]:
        """Files with sizes and windows, and a hash of all bytes."""
        digest = hashlib.sha256(f"{self._window} {self._stride}".encode())
        for text in self._texts:
            digest.update(np.ascontiguousarray(text).data)
        return {"files": self._files.described(self._counts), "rows": len(self), "hash": digest.hexdigest()}

    def _mapped(self, name: str) -> np.ndarray:
        if "://" not in name and Path(name).stat().st_size:
            return np.memmap(name, np.uint8, "r")
        with self._files.open(name) as file:
            return np.frombuffer(file.read(), np.uint8)

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"text: window {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, (index - int(self._ends[file]) + self._counts[file]) * self._stride

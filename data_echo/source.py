"""Where examples come from: anything with a length and random access."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_echo.errors import DataError


class Source(Protocol):
    """Random access to examples, the same at every reading.

    A source may also have
        `origin(index) -> str`: where an example comes from, as `file:row`, for error messages;
        `fingerprint() -> dict`: what identifies the data (files, sizes, rows, hash of the index);
        `rows_together() -> int`: rows that are read at once, where reading them apart costs far more; else 1.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class ArraySource:
    """Examples in memory (or in memory-mapped arrays): row i of every array.

    Args:
        arrays: name -> array [N, ...]; an example is a dict of their rows.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"source: arrays: lengths {lengths}; one length for all, and at least one array")
        self._arrays = dict(arrays)
        self._length = next(iter(lengths.values()))

    @classmethod
    def from_files(cls, files: str | Path | Mapping[str, str | Path]) -> ArraySource:
        """Arrays of one .npz file, or of .npy files by name; the latter are mapped into memory, not read.

        Raises:
            DataError: a file is missing or is none of these.
        """
        try:
            if isinstance(files, str | Path):
                with np.load(files, allow_pickle=False) as archive:
                    return cls(dict(archive))
            return cls({name: np.load(path, mmap_mode="r") for name, path in files.items()})
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"source: {files}: {error}; a .npz file, or names with .npy files") from None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self._arrays.items()}

    def fingerprint(self) -> dict[str, Any]:
        """Rows, dtypes, shapes and a hash of all bytes."""
        digest = hashlib.sha256()
        for name, array in sorted(self._arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return {"rows": self._length, "hash": digest.hexdigest()}

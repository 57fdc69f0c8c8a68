"""Sources of examples: anything with a length and random access."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_echo.errors import DataError


class Source(Protocol):
    """Random access to examples, which are the same at every reading.

    A source may also have
        `origin(index) -> str`: where an example comes from, as `file:row`, for error messages;
        `fingerprint() -> dict`: what identifies the data (files, sizes, rows, hash of the index);
        `rows_together() -> int`: rows that are read at once, where reading them alone costs far more; else 1.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


_HASHED_BYTES, _HASHED_AT_ONCE = 2**30, 2**24


class ArraySource:
    """Examples in memory (or in memory-mapped arrays): row i of every array.

    Args:
        arrays: name -> array [N, ...]; an example is a dict of their rows.

    Raises:
        DataError: there is no array, or their lengths differ.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(
                f"source: arrays: lengths {lengths}", "one length for all, and at least one array"
            )
        self._arrays = dict(arrays)
        self._length = next(iter(lengths.values()))

    @classmethod
    def from_files(cls, files: str | Path | Mapping[str, str | Path]) -> ArraySource:
        """Source of one .npz file, or of .npy files by name; .npy files are mapped into memory, not read.

        Raises:
            DataError: a file is missing, or is not of this kind.
        """
        try:
            if isinstance(files, str | Path):
                with np.load(files, allow_pickle=False) as archive:
                    return cls(dict(archive))
            return cls({name: np.load(path, mmap_mode="r") for name, path in files.items()})
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"source: {files}: {error}", "a .npz file, or names with .npy files") from None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self._arrays.items()}

    def fingerprint(self) -> dict[str, Any]:
        """Rows, and a hash of dtypes, shapes and all bytes.

        Of an array above a GiB only a GiB of evenly spaced rows is hashed: reading it whole at every start
        would take too long.
        """
        digest = hashlib.sha256()
        for name, array in sorted(self._arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            for rows in _hashed_rows(array):
                digest.update(np.ascontiguousarray(array[rows]).data)
        return {"rows": self._length, "hash": digest.hexdigest()}


def _hashed_rows(array: np.ndarray) -> Iterator[slice | np.ndarray]:
    """The rows that identify an array, in parts."""
    if array.nbytes <= _HASHED_BYTES:
        yield slice(None)
        return
    of_row = array.nbytes // len(array)
    count = max(2, _HASHED_BYTES // of_row)
    chosen = np.arange(count) * (len(array) - 1) // (count - 1)
    at_once = max(1, _HASHED_AT_ONCE // of_row)
    yield from (chosen[start : start + at_once] for start in range(0, count, at_once))

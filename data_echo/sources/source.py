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
        `rows_together() -> int`: rows that are read at once, where reading them alone costs far more; else 1;
        `skipped`: a tuple of lines on what lies with the data and is not read;
        `classes`: a tuple of the classes' names in the order of the labels, the same for all splits.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


_HASHED_BYTES, _HASHED_AT_ONCE = 2**30, 2**24


class ArraySource:
    """Examples in memory (or in memory-mapped arrays): row i of every array.

    Args:
        arrays: name -> array [N, ...] of any dtype, or what NumPy makes one of; an example is a dict of their
            rows.

    Raises:
        DataError: there is no array, one has a mask or no rows to number, or their lengths differ.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = {name: _as_array(name, array) for name, array in arrays.items()}
        lengths = {name: len(array) for name, array in self._arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(
                f"source: arrays: lengths {lengths}", "one length for all, and at least one array"
            )
        self._length = next(iter(lengths.values()))

    @classmethod
    def from_files(cls, files: str | Path | Mapping[str, str | Path]) -> ArraySource:
        """Source of one .npz file, or of .npy files by name; .npy files are mapped into memory, not read.

        Raises:
            DataError: a file is missing, or is not of this kind.
        """
        try:
            if isinstance(files, str | Path):
                with np.load(Path(files).expanduser(), allow_pickle=False) as archive:
                    return cls(dict(archive))
            mapped = {name: Path(path).expanduser() for name, path in files.items()}
            return cls({name: np.load(path, mmap_mode="r") for name, path in mapped.items()})
        except DataError:
            raise
        except Exception as error:  # damaged archives lead to errors of several libraries
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
                digest.update(_bytes(array[rows]))
        return {"rows": self._length, "hash": digest.hexdigest()}


def _as_array(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"source: {name}: {error}", "one array") from None
    if isinstance(values, np.ma.MaskedArray) or not array.ndim:
        what = "a masked array" if array.ndim else "a single value"
        raise DataError(f"source: {name}: {what}", "an array without a mask, with a row for each example")
    return array


def _bytes(rows: np.ndarray) -> memoryview | bytes:
    """What identifies rows: their bytes, and the text of objects, whose bytes are addresses."""
    if rows.dtype.hasobject:
        return repr(rows.tolist()).encode()
    return np.ascontiguousarray(rows).view(np.uint8).data if rows.nbytes else b""


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

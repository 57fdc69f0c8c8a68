"""Parquet files in the layout of Hugging Face datasets: many files, images as bytes in a struct column."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_echo.errors import DataError
from data_echo.sources.files import FileSet

_Column = Callable[[int], Any]


class ParquetSource:
    """Rows of Parquet files, by number.

    An example is a dict of its columns: numbers as NumPy scalars, lists as arrays, text as str, bytes as
    memoryviews, and a Hugging Face image (`struct{bytes, path}`) as its bytes. Row groups are read whole and
    the latest are kept in memory.

    Args:
        files: a folder, a pattern (`data/train-*.parquet`), a file, or several files; local paths or fsspec
            addresses.
        columns: the columns to read; None for all.
        cache_bytes: the most bytes of row groups that are kept. For data larger than that, shuffle blocks of
            rows (`batch.shuffle` in a recipe); otherwise nearly every example costs the reading of a group.

    Raises:
        DataError: there is no such file or column.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        columns: Sequence[str] | None = None,
        *,
        cache_bytes: int = 2**30,
    ) -> None:
        import pyarrow.parquet

        self._files = FileSet(files, ".parquet")
        self._readers: list[Any] = []
        for name in self._files.names:
            try:
                self._readers.append(pyarrow.parquet.ParquetFile(self._files.open(name)))
            except (OSError, ValueError) as error:
                raise DataError(f"parquet: {name}: {error}", "a whole Parquet file") from None
        self._columns = self._checked(columns)
        groups = [
            (file, group)
            for file, reader in enumerate(self._readers)
            for group in range(reader.num_row_groups)
        ]
        rows = [self._readers[file].metadata.row_group(group).num_rows for file, group in groups]
        self._groups = groups
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._cache: OrderedDict[int, tuple[dict[str, _Column], int]] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, row = self._place(index)
        return {name: column(row) for name, column in self._group(group).items()}

    def origin(self, index: int) -> str:
        """`file:row` of an example, rows counted from 0 in each file."""
        group, row = self._place(index)
        file = self._groups[group][0]
        first = next(number for number, (other, _) in enumerate(self._groups) if other == file)
        return f"{self._files.names[file]}:{int(self._starts[group] - self._starts[first]) + row}"

    def rows_together(self) -> int:
        """Rows of the largest row group if the data do not fit into the cache; else 1."""
        fits = self._bytes() <= self._cache_bytes
        return 1 if fits else int(np.diff(self._starts).max())

    def fingerprint(self) -> dict[str, Any]:
        """Files with sizes and rows, and a hash of their footers."""
        digest = hashlib.sha256()
        for reader in self._readers:
            digest.update(json.dumps(reader.metadata.to_dict(), sort_keys=True, default=str).encode())
        rows = [reader.metadata.num_rows for reader in self._readers]
        return {"files": self._files.described(rows), "rows": len(self), "hash": digest.hexdigest()}

    def _bytes(self) -> int:
        """Uncompressed bytes of the columns that are read, of all row groups."""
        total = 0
        for file, group in self._groups:
            stored = self._readers[file].metadata.row_group(group)
            columns = (stored.column(number) for number in range(stored.num_columns))
            total += sum(
                column.total_uncompressed_size
                for column in columns
                if column.path_in_schema.partition(".")[0] in self._columns
            )
        return total

    def _checked(self, columns: Sequence[str] | None) -> list[str]:
        known = self._readers[0].schema_arrow.names
        for name in columns or ():
            if name not in known:
                raise DataError(
                    f"parquet: columns: {name!r} is not in {self._files.names[0]}",
                    f"one of {', '.join(known)}",
                )
        return list(columns or known)

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"parquet: row {index} of {len(self)}")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, index - int(self._starts[group])

    def _group(self, number: int) -> dict[str, _Column]:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number][0]
        file, group = self._groups[number]
        table = self._readers[file].read_row_group(group, columns=self._columns, use_threads=False)
        columns = {name: _column(table.column(name).combine_chunks()) for name in self._columns}
        self._cache[number] = (columns, table.nbytes)
        self._cached_bytes += table.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1][1]
        return columns


def _column(array: Any) -> _Column:
    """Fast access to one column of a row group, by row."""
    import pyarrow.types as types

    if types.is_struct(array.type) and array.type.get_field_index("bytes") >= 0:
        array = array.field("bytes")
    if types.is_binary(array.type) and not array.null_count:
        offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset :]
        data = memoryview(array.buffers()[2]).cast("B")
        bounds = offsets.tolist()
        return lambda row: data[bounds[row] : bounds[row + 1]]
    if (types.is_integer(array.type) or types.is_floating(array.type)) and not array.null_count:
        return array.to_numpy(zero_copy_only=False).__getitem__
    if types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        return lambda row: np.asarray(array[row].values)
    return lambda row: array[row].as_py()

"""Parquet files in the layout of Hugging Face datasets: many files, images as bytes in a struct column."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet, types

from data_echo.errors import DataError
from data_echo.sources.files import FileSet, OpenFiles

_Column = Callable[[int], Any]

_SHOWN = 5  # classes in a message
_TEXTS = (types.is_string, types.is_large_string, types.is_string_view)
_BYTES = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
_LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)


class ParquetSource:
    """Rows of Parquet files, by number.

    An example is a dict of its columns: numbers as NumPy scalars, lists as arrays, text as str, bytes as
    memoryviews, a Hugging Face image (`struct{bytes, path}`) as its bytes, nulls as None, and everything else
    as Arrow gives it to Python. A column has one type in all files; dictionaries, and long and short ways of
    storing text, bytes and lists, count as one. Row groups are read whole and the latest are kept in memory,
    and few files are open at a time.

    Args:
        files: a folder, a pattern (`data/train-*.parquet`), a file, or several files; local paths or fsspec
            addresses.
        columns: the columns to read; None for all.
        cache_bytes: the most bytes of row groups that are kept. For data larger than that, shuffle blocks of
            rows (`batch.shuffle` in a recipe); otherwise nearly every example costs the reading of a group.

    Attributes:
        skipped: a line on the files that were left out, if any.
        classes: the names of the classes, in the order of the labels, where one of the columns is a
            `ClassLabel` of Hugging Face; else None.

    Raises:
        DataError: there is no such file or column, a column is missing in a file, stands there twice or has
            another type, or the files have no rows.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        columns: Sequence[str] | None = None,
        *,
        cache_bytes: int = 2**30,
    ) -> None:
        self._files = FileSet(files, ".parquet")
        self.skipped = self._files.skipped
        self._opened = OpenFiles(self._files)
        self._readers = [_ParquetFile(name, self._opened) for name in self._files.names]
        self._columns = self._checked(columns)
        schema = self._readers[0].schema_arrow
        labels = [names for column in self._columns if (names := _class_names(schema, column))]
        self.classes = labels[0] if len(labels) == 1 else None
        groups = [
            (file, group)
            for file, reader in enumerate(self._readers)
            for group in range(reader.metadata.num_row_groups)
        ]
        rows = [self._readers[file].metadata.row_group(group).num_rows for file, group in groups]
        self._groups = groups
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._cache: OrderedDict[int, tuple[dict[str, _Column], int]] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        if self._starts[-1] <= 0:
            raise DataError(f"parquet: {files}: no rows in {len(self._readers)} files", "at least one row")

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
        """The columns to read, after a look at the schema of every file."""
        if isinstance(columns, str) or len(set(columns or ())) != len(columns or ()):
            raise DataError(f"parquet: columns: {columns!r}", "a list of names, each once")
        first = self._readers[0]
        wanted = list(columns or first.schema_arrow.names)
        for reader in self._readers:
            known = reader.schema_arrow.names
            for name in wanted:
                _compare_column(name, first, reader)
            more = [name for name in known if name not in wanted and columns is None]
            if more:
                raise DataError(
                    f"parquet: columns: {more[0]!r} is in {reader.name}, but not in {first.name}",
                    "the same columns in all files, or the names of those to read: `columns=[...]`",
                )
        return wanted

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
        columns = {name: _column_of(table.column(name)) for name in self._columns}
        self._cache[number] = (columns, table.nbytes)
        self._cached_bytes += table.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1][1]
        return columns


class _ParquetFile:
    """The footer of a file, which is opened again when rows are read."""

    def __init__(self, name: str, opened: OpenFiles) -> None:
        self.name = name
        self._opened = opened
        self.metadata: Any = None
        try:
            reader = self._reader()
            self.metadata, self.schema_arrow = reader.metadata, reader.schema_arrow
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"parquet: {name}: {error}", "a whole Parquet file") from None

    def read_row_group(self, group: int, **how: Any) -> Any:
        """Table of a row group."""
        return self._reader().read_row_group(group, **how)

    def _reader(self) -> Any:
        file = self._opened.file(self.name)
        return parquet.ParquetFile(file, metadata=self.metadata, page_checksum_verification=True)


def _compare_column(name: str, first: _ParquetFile, other: _ParquetFile) -> None:
    """Refuse a column of a file that is not there once, or means something else than in the first file."""
    known = other.schema_arrow.names
    if known.count(name) != 1:
        what = "stands twice" if name in known else "is not"
        raise DataError(f"parquet: columns: {name!r} {what} in {other.name}", f"one of {', '.join(known)}")
    schemas = first.schema_arrow, other.schema_arrow
    one, two = (schema.field(name).type for schema in schemas)
    if _given_type(one) != _given_type(two):
        raise DataError(
            f"parquet: columns: {name!r} is {one} in {first.name}, {two} in {other.name}",
            "one type in all files: write them again with one schema",
        )
    names, its_names = (_class_names(schema, name) for schema in schemas)
    if names and its_names and names != its_names:
        raise DataError(
            f"parquet: columns: {name!r} numbers the classes {_few(names)} in {first.name}, "
            f"{_few(its_names)} in {other.name}",
            "one list of classes in all files: write them again with one schema",
        )


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Names of a column's classes, which Hugging Face's `datasets` keeps beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)})" if len(names) > _SHOWN else "")


def _given_type(stored: Any) -> Any:
    """The Arrow type of a column's values as they are given, which is one for several ways of storing."""
    if types.is_dictionary(stored):
        return _given_type(stored.value_type)
    if _is_image(stored):
        return _given_type(stored.field("bytes").type)
    if _is_one_of(stored, _BYTES):
        return pyarrow.binary()
    if _is_one_of(stored, _TEXTS):
        return pyarrow.string()
    if _is_one_of(stored, _LISTS):
        return pyarrow.list_(_given_type(stored.value_type))
    return stored


def _column_of(array: Any) -> _Column:
    """Access by row to one column, a ChunkedArray, of a row group; nulls are None."""
    parts = [_column(chunk) for chunk in array.chunks]
    if len(parts) == 1:
        return parts[0]
    starts = [0, *accumulate(map(len, array.chunks))]

    def value(row: int) -> Any:
        part = bisect_right(starts, row) - 1
        return parts[part](row - starts[part])

    return value


def _column(array: Any) -> _Column:
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _is_image(array.type):
        array = array.flatten()[array.type.get_field_index("bytes")]  # null where the whole image is
    if types.is_binary(array.type) and not array.null_count and array.buffers()[2]:
        offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset :]
        data = memoryview(array.buffers()[2]).cast("B")
        bounds = offsets.tolist()
        return lambda row: data[bounds[row] : bounds[row + 1]]
    if types.is_integer(array.type) or types.is_floating(array.type):
        return _numbers(array)
    if _is_one_of(array.type, _LISTS):
        return lambda row: _list(array[row].values)
    if isinstance(array.type, pyarrow.FixedShapeTensorType):
        return lambda row: array[row].to_numpy()
    return lambda row: array[row].as_py()


def _numbers(array: Any) -> _Column:
    """NumPy scalars of the column's dtype, whatever else is null in the row group."""
    if not array.null_count:
        return array.to_numpy(zero_copy_only=False).__getitem__
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    filled = array.fill_null(pyarrow.scalar(0, array.type)).to_numpy(zero_copy_only=False)
    return lambda row: None if is_null[row] else filled[row]


def _list(values: Any) -> np.ndarray | None:
    """A list as an array; lists of equally long lists have more dimensions, others are arrays of arrays.

    Raises:
        DataError: a number of it is null.
    """
    if values is None:
        return None
    if types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not _is_one_of(values.type, _LISTS):
        is_number = types.is_integer(values.type) or types.is_floating(values.type)
        if is_number and values.null_count:
            raise DataError(f"parquet: a null in a list of {values.type}", "numbers alone")
        return values.to_numpy(zero_copy_only=False)
    rows = [_list(values[row].values) for row in range(len(values))]
    first = rows[0] if rows else None
    if first is not None and first.dtype != object and all(_is_like(row, first) for row in rows):
        return np.stack(rows)  # type: ignore[arg-type]
    ragged = np.empty(len(rows), object)
    ragged[:] = rows
    return ragged


def _is_like(row: np.ndarray | None, first: np.ndarray) -> bool:
    return row is not None and (row.dtype, row.shape) == (first.dtype, first.shape)


def _is_image(stored: Any) -> bool:
    return bool(types.is_struct(stored) and stored.get_field_index("bytes") >= 0)


def _is_one_of(stored: Any, kinds: tuple[Callable[[Any], bool], ...]) -> bool:
    return any(is_kind(stored) for is_kind in kinds)

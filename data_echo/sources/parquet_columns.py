"""Columns of Parquet files: what a value becomes, and fast access to those of a row group."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow
from pyarrow import types

from data_echo.errors import DataError

ParquetColumn = Callable[[int], Any]

_TEXTS = (types.is_string, types.is_large_string, types.is_string_view)
_BYTES = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
_LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)


def given_type(stored: Any) -> Any:
    """The Arrow type of a column's values as they are given, which is one for several ways of storing."""
    if types.is_dictionary(stored):
        return given_type(stored.value_type)
    if _is_image(stored) or _is_one_of(stored, _BYTES):
        return pyarrow.binary()
    if _is_one_of(stored, _TEXTS):
        return pyarrow.string()
    if _is_one_of(stored, _LISTS):
        return pyarrow.list_(given_type(stored.value_type))
    return stored


def column_of(array: Any) -> ParquetColumn:
    """Access by row to one column, a ChunkedArray, of a row group; nulls are None."""
    parts = [_column(chunk) for chunk in array.chunks]
    if len(parts) == 1:
        return parts[0]
    starts = [0, *accumulate(map(len, array.chunks))]

    def value(row: int) -> Any:
        part = bisect_right(starts, row) - 1
        return parts[part](row - starts[part])

    return value


def _column(array: Any) -> ParquetColumn:
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


def _numbers(array: Any) -> ParquetColumn:
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

"""The echo buffer: rows of prepared examples that wait to be served, on the host or on the model's device."""

from __future__ import annotations

import numpy as np
import torch

from data_echo.errors import DataError
from data_echo.order.hashing import Ints
from data_echo.prepare.example_form import PreparedArrays

# torch copies and views these dtypes, but cannot gather them; their bytes are kept as signed integers.
_KEPT_AS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class ExampleBuffer:
    """Rows of storage, each holding one example until it is released.

    On a CUDA device, examples are copied to it once, however often they are served; kept on the host, they
    are copied each time they are served. Both copies go through pinned memory, and the host does not wait for
    them.

    Args:
        device: the device of micro-batches.
        rows: rows of storage at first; more are added when needed.
        on_host: keep examples in the host's memory, on any device.
    """

    def __init__(self, device: torch.device | str, rows: int, on_host: bool = False) -> None:
        self._wanted = torch.device(device)
        self._device = torch.device("cpu") if on_host else self._wanted
        self._columns: dict[str, torch.Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._forms: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._free = np.arange(rows)[::-1].copy()  # a stack; its top is at `_free_rows`
        self._free_rows = rows
        self.bytes_received = 0

    @property
    def rows(self) -> int:
        """Rows of storage, used or free."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Rows in use."""
        return self.rows - self._free_rows

    @property
    def bytes(self) -> int:
        """Bytes of storage."""
        return sum(column.nbytes for column in self._columns.values())

    def put(self, arrays: PreparedArrays) -> Ints:
        """Store examples; returns their rows, int64 [n].

        Raises:
            DataError: an array holds neither numbers nor booleans, or keys, dtypes, shapes or lengths differ
                from those of the arrays before.
        """
        count = len(next(iter(arrays.values())))
        self._compare(arrays, count)
        if count > self._free_rows:
            self._grow(max(count - self._free_rows, self.rows // 4))
        self._free_rows -= count
        rows = self._free[self._free_rows : self._free_rows + count].copy()
        for name, array in arrays.items():
            self.bytes_received += array.nbytes
            self._store(name, rows, array)
        return rows

    def gather(self, rows: Ints) -> dict[str, torch.Tensor]:
        """A copy of some rows of every column, [rows, ...], on the device of micro-batches."""
        where = _moved(torch.from_numpy(rows), self._device)
        picked = {name: column.index_select(0, where) for name, column in self._columns.items()}
        return {name: _moved(rows, self._wanted).view(self._dtypes[name]) for name, rows in picked.items()}

    def release(self, rows: Ints) -> None:
        """Free rows."""
        self._free[self._free_rows : self._free_rows + len(rows)] = rows
        self._free_rows += len(rows)

    def _compare(self, arrays: PreparedArrays, count: int) -> None:
        """Refuse arrays that do not fit into the columns: NumPy would spread them or take their bits."""
        if self._columns and arrays.keys() != self._columns.keys():
            raise DataError(f"buffer: keys {[*arrays]}, but {[*self._columns]} before", "the same keys")
        for name, array in arrays.items():
            dtype, shape = self._forms.get(name, (array.dtype, array.shape[1:]))
            if (array.dtype, array.shape) != (dtype, (count, *shape)):
                raise DataError(
                    f"buffer: {name}: {array.dtype} {list(array.shape)}",
                    f"{dtype} {[count, *shape]}, as before: one dtype and one shape for each key",
                )

    def _store(self, name: str, rows: Ints, array: np.ndarray) -> None:
        if name not in self._columns:
            self._add_column(name, array)
        column = self._columns[name]
        if self._device.type == "cuda":
            staged = torch.empty(array.shape, dtype=column.dtype, pin_memory=True)
            staged.numpy().view(array.dtype)[...] = array
            where = _moved(torch.from_numpy(rows), self._device)
            column.index_copy_(0, where, staged.to(self._device, non_blocking=True))
        else:
            column.numpy().view(array.dtype)[rows] = array

    def _add_column(self, name: str, array: np.ndarray) -> None:
        try:
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        except TypeError:
            raise DataError(f"prepare: {name}: {array.dtype} is no number", "numbers or booleans") from None
        self._dtypes[name] = dtype
        self._forms[name] = (array.dtype, array.shape[1:])
        shape = (self.rows, *array.shape[1:])
        self._columns[name] = torch.empty(shape, dtype=_KEPT_AS.get(dtype, dtype), device=self._device)

    def _grow(self, more: int) -> None:
        before = self.rows
        self._free = np.concatenate([self._free, np.zeros(more, np.int64)])
        self.release(np.arange(before, before + more))
        for name, column in self._columns.items():
            larger = torch.empty((self.rows, *column.shape[1:]), dtype=column.dtype, device=self._device)
            larger[:before] = column
            self._columns[name] = larger


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; the host does not wait for a copy to CUDA."""
    if tensor.device == device or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

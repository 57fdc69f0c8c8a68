"""The form of prepared examples: one dtype and one shape for each key, the same in a whole split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_echo.errors import DataError

PreparedArrays = dict[str, np.ndarray]

_KINDS = "biufc"  # of dtypes: booleans, integers, floats, complex numbers
_TOO_LONG = "gG"  # long double, which torch does not have
_ONE_DTYPE = "one dtype for all: convert in `prepare`, or when the data are written"
_ONE_SHAPE = "one shape for all (pad ragged ones)"
_SAME_KEYS = "the same keys in all"


@dataclass(frozen=True)
class ExampleForm:
    """Keys, dtypes and shapes of a split's examples, which are those of its first example.

    Every process takes them from the same example, so whether an example is refused does not depend on how
    many processes prepare, or on what else is in its request.

    Attributes:
        where: `split: prepare`, for messages.
        first: the example that they are taken from, as text.
        columns: dtype in native byte order and shape, by key.
    """

    where: str
    first: str
    columns: dict[str, tuple[np.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, example: Any, where: str, first: str) -> ExampleForm:
        """Form of an example.

        Raises:
            DataError: it is no dict of numbers and arrays of numbers.
        """
        if not isinstance(example, Mapping) or not example:
            raise DataError(
                f"{where}: {first} became {_described(example)}", "a dict with at least one array or number"
            )
        columns = {}
        for name, value in example.items():
            array = _array(value)
            dtype = array.dtype
            if isinstance(array, np.ma.MaskedArray):
                raise DataError(
                    f"{where}: {name}: a masked array in {first}", "an array without a mask (fill it)"
                )
            if dtype.kind not in _KINDS or dtype.char in _TOO_LONG:
                what = "None (a missing value)" if value is None else str(dtype)
                raise DataError(f"{where}: {name}: {what} is no number", f"numbers or booleans in {first}")
            columns[name] = (dtype.newbyteorder("="), array.shape)
        return cls(where, first, columns)

    def stacked(self, examples: Sequence[Any], named: Callable[[int], str]) -> PreparedArrays:
        """Stacked examples: one array [n, ...] for each key.

        Args:
            named: the name of an example of the list, for messages.

        Raises:
            DataError: an example has other keys, dtypes or shapes.
        """
        try:
            # NumPy compares all dtypes and shapes while it stacks; byte order is all that it may convert.
            arrays = {
                name: np.stack([example[name] for example in examples], dtype=dtype, casting="equiv")
                for name, (dtype, _) in self.columns.items()
            }
            if self._holds(arrays) and sum(map(len, examples)) == len(examples) * len(arrays):
                return arrays
        except (KeyError, TypeError, ValueError):
            pass
        for number, example in enumerate(examples):
            self._compare(example, named(number))
        raise DataError(f"{self.where}: examples cannot be stacked", "a dict of arrays for each")

    def _holds(self, arrays: PreparedArrays) -> bool:
        return all(
            arrays[name].shape[1:] == shape and type(arrays[name]) is np.ndarray
            for name, (_, shape) in self.columns.items()
        )

    def _compare(self, example: Any, named: str) -> None:
        """Refuse an example of another form."""
        columns = ExampleForm.of(example, self.where, named).columns
        for name in [*self.columns, *columns]:
            if name not in columns or name not in self.columns:
                lacking, having = (named, self.first) if name not in columns else (self.first, named)
                raise DataError(
                    f"{self.where}: {name}: missing in some examples",
                    f"{_SAME_KEYS}: {having} has it, {lacking} has not",
                )
            (dtype, shape), (other, its_shape) = self.columns[name], columns[name]
            if dtype != other:
                raise DataError(
                    f"{self.where}: {name}: {dtype} in {self.first}, {other} in {named}", _ONE_DTYPE
                )
            if shape != its_shape:
                raise DataError(
                    f"{self.where}: {name}: shapes {sorted({shape, its_shape})}",
                    f"{_ONE_SHAPE}: {shape} in {self.first}, {its_shape} in {named}",
                )


def _array(value: Any) -> np.ndarray:
    try:
        return np.asanyarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors that NumPy cannot view
        return np.empty((), object)


def _described(example: Any) -> str:
    return "an empty dict" if isinstance(example, Mapping) else f"a {type(example).__name__}"

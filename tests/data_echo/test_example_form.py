"""One dtype and one shape for each key of a split, whatever brings them apart."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_echo import ArraySource, DataError, EchoLoader, InlinePreparer, PrepareRequest, Schedule
from data_echo.buffer import ExampleBuffer

DTYPES = ["?", "u1", "i1", "u2", "<i4", ">i4", "i8", "u8", "f2", "<f4", ">f4", "f8", "c8"]


class Listed:
    """A task whose examples are the entries of a list."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def source(self, split: str) -> ArraySource:
        return ArraySource({"number": np.arange(len(self.examples))})

    def prepare(self, example: dict[str, Any], draw: Any) -> Any:
        return self.examples[example["number"]]


def prepared(examples: list[Any], indices: list[int]) -> dict[str, np.ndarray]:
    preparer = InlinePreparer(Listed(examples), 0)
    index = np.array(indices)
    return preparer.collect(preparer.submit(PrepareRequest("train", np.zeros_like(index), index)))


def test_a_buffer_never_takes_the_bits_of_another_dtype() -> None:
    buffer = ExampleBuffer("cpu", 8)
    buffer.put({"y": np.arange(4)})
    with pytest.raises(DataError, match=r"buffer: y: float64 \[4\]; int64 \[4\], as before"):
        buffer.put({"y": np.arange(4.0)})
    assert buffer.held == 4, "a refused array takes no rows"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"y": np.zeros((4, 3))}, {"y": np.zeros((4, 1))}),  # NumPy would spread it over three columns
        ({"y": np.zeros(4), "x": np.zeros(4)}, {"y": np.zeros(4)}),  # x would be what lay in memory
        ({"y": np.zeros(4)}, {"y": np.zeros(4), "x": np.zeros(4)}),
        ({"y": np.zeros(4)}, {"y": np.zeros(4), "x": np.zeros(1)}),
        ({"y": np.zeros(4, np.int64)}, {"y": np.zeros(4, np.uint64)}),
        ({"y": np.zeros(4, "<f4")}, {"y": np.zeros(4, ">f4")}),
    ],
)
def test_a_buffer_refuses_what_does_not_fit(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray]
) -> None:
    buffer = ExampleBuffer("cpu", 16)
    buffer.put(first)
    with pytest.raises(DataError, match="buffer: "):
        buffer.put(second)


@given(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=6), st.randoms())
def test_examples_of_several_dtypes_are_refused_in_any_request(dtypes: list[str], random: Any) -> None:
    examples = [{"y": np.full(2, 1, dtype)} for dtype in dtypes]
    indices = [random.randrange(len(dtypes)) for _ in range(4)]
    first = np.dtype(dtypes[0]).newbyteorder("=")
    others = [np.dtype(dtypes[index]).newbyteorder("=") for index in indices]
    wrong = [(index, other) for index, other in zip(indices, others, strict=True) if other != first]
    if not wrong:
        assert prepared(examples, indices)["y"].dtype == first
        assert prepared(examples, indices)["y"].tolist() == [[1, 1]] * 4
        return
    index, other = wrong[0]
    with pytest.raises(
        DataError, match=rf"^train: prepare: y: {first} in example 0, {other} in example {index}; one dtype"
    ):
        prepared(examples, indices)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"y": 1}, {"y": 2.0}], r"y: int64 in example 0, float64 in example 1"),
        ([{"y": 1}, {"y": True}], r"y: int64 in example 0, bool in example 1"),
        ([{"y": 1}, {"y": 2**63}], r"y: int64 in example 0, uint64 in example 1"),
        ([{"y": 1}, {"y": None}], r"y: None \(a missing value\) is no number; numbers .* in example 1"),
        ([{"y": 1}, {"y": "one"}], r"y: <U3 is no number; numbers or booleans in example 1"),
        ([{"y": 1}, {"y": 2**64}], r"y: object is no number; numbers or booleans in example 1"),
        ([{"y": 1}, {"y": np.datetime64("2020-01-01")}], r"y: datetime64\[D\] is no number"),
        ([{"y": np.zeros(1, "i4,f4")}], "is no number; numbers or booleans in example 0"),
        ([{"y": np.longdouble(1)}], "is no number"),
        ([{"y": [[1], [2, 3]]}], "y: object is no number"),
        ([{"y": torch.zeros(2, dtype=torch.bfloat16)}], "y: object is no number"),
        ([{"y": np.ma.masked_equal([1, 2], 2)}], "y: a masked array in example 0; an array without a mask"),
        ([{"y": np.array([1, 2])}, {"y": np.ma.masked_equal([1, 2], 2)}], "y: a masked array in example 1"),
        ([{"y": np.zeros(3)}, {"y": np.zeros(1)}], r"y: shapes \[\(1,\), \(3,\)\]; one shape for all"),
        ([{"y": 0, "x": 0}, {"y": 0}], "x: missing in some examples; the same keys in all: example 0 has it"),
        ([{"y": 0}, {"y": 0, "x": 0}], "x: missing in some examples; .* example 1 has it, example 0 has not"),
        ([{"y": 0}, {"x": 0}], "y: missing in some examples"),
        ([{"y": 0}, (0, 1)], "prepare: example 1 became a tuple; a dict with at least one array"),
        ([{"y": 0}, None], "prepare: example 1 became a NoneType"),
        ([{}], "prepare: example 0 became an empty dict"),
    ],
)
def test_what_is_no_example_is_named(examples: list[Any], message: str) -> None:
    for indices in (range(len(examples)), [len(examples) - 1]):  # in a request with the first, and without
        with pytest.raises(DataError, match=message):
            prepared(examples, list(indices))


def test_what_torch_has_and_lists_are_taken_as_they_are() -> None:
    examples = [
        {"t": torch.arange(3) + n, "l": [n, 2.5], "h": np.float16(n), "e": np.zeros(0)} for n in (0, 1)
    ]
    arrays = prepared(examples, [1, 0, 1])
    assert arrays["t"].tolist() == [[1, 2, 3], [0, 1, 2], [1, 2, 3]]
    assert arrays["l"].tolist() == [[1, 2.5], [0, 2.5], [1, 2.5]]
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "t": "int64",
        "l": "float64",
        "h": "float16",
        "e": "float64",
    }


def test_the_bad_first_example_is_passed_over_where_bad_ones_are() -> None:
    class Bad(Listed):
        def prepare(self, example: dict[str, Any], draw: Any) -> Any:
            return {"y": 1 // int(example["number"])}

    index = np.array([3, 2])
    preparer = InlinePreparer(Bad([None] * 4), 0, skip_bad=True)
    assert preparer.collect(PrepareRequest("train", np.zeros(2, int), index))["y"].tolist() == [0, 0]
    assert not preparer.stats.skipped, "it was not served"
    with pytest.raises(DataError, match="example 0: ZeroDivisionError"):
        InlinePreparer(Bad([None] * 4), 0).collect(PrepareRequest("train", np.zeros(2, int), index))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_refuses_the_same_example(workers: int) -> None:
    examples = [{"y": n if n < 8 else float(n)} for n in range(16)]
    schedule = Schedule(examples=16, lanes=6, micro=1, factor=1, capacity=0, seed=0, block=8, window=1)
    for worker in range(workers):
        loader = EchoLoader(
            schedule, InlinePreparer(Listed(examples), 0), lanes=range(worker, 6, workers), depth=1
        )
        with pytest.raises(DataError, match="y: int64 in example 0, float64 in example"):
            deque((loader.micro_batch(j) for j in range(16) if loader.serves(j)), maxlen=0)


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">i8", "f2", "c16", "?", "u2", "u8"])
def test_arrays_of_any_numbers_reach_the_batch_with_their_values(dtype: str) -> None:
    class Rows:
        def source(self, split: str) -> ArraySource:
            return ArraySource(
                {"one": np.arange(6).astype(dtype), "two": np.arange(12).reshape(6, 2).astype(dtype)}
            )

        def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
            return example

    schedule = Schedule(examples=6, lanes=1, micro=3, factor=1, capacity=0, seed=0)
    loader = EchoLoader(schedule, InlinePreparer(Rows(), 0), lanes=[0])
    batch, _ = loader.micro_batch(0)
    index = loader.served(0).index
    assert batch["one"].tolist() == np.arange(6).astype(dtype)[index].tolist()
    assert batch["two"].tolist() == np.arange(12).reshape(6, 2).astype(dtype)[index].tolist()


def test_arrays_that_do_not_hold_numbers_are_named() -> None:
    for array in (
        np.array([1, None]),
        np.array(["a", "b"]),
        np.zeros(2, "i4,f8"),
        np.array(["2020"], "M8[D]"),
    ):
        source = ArraySource({"y": array})
        assert source.fingerprint() == ArraySource({"y": array.copy()}).fingerprint()
        with pytest.raises(
            DataError, match=r"train: prepare: y: .* is no number; numbers or booleans in example"
        ):
            prepared([source[row] for row in range(len(source))], [len(source) - 1])


def test_what_is_not_an_array_becomes_one_or_is_refused() -> None:
    source = ArraySource({"x": [1, 2.5], "t": torch.arange(2)})
    assert [source[row]["x"].dtype for row in range(2)] == [np.float64] * 2
    assert source[1]["t"] == 1
    assert source.fingerprint()["rows"] == 2
    for wrong, what in (
        ([[1], [2, 3]], "y: "),
        (3, "a single value"),
        (np.ma.masked_equal([1, 2], 2), "masked"),
    ):
        with pytest.raises(DataError, match=f"source: y: .*{what.removeprefix('y: ')}"):
            ArraySource({"y": wrong})

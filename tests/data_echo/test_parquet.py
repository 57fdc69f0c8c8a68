"""Parquet: the columns of all files have one type, values are read as they are, and few files stay open."""

import json
import re
import resource
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_echo import DataError, ExampleError, InlinePreparer, ParquetSource, PrepareRequest
from data_echo.sources import parquet

TYPES = ["bool", "int8", "int32", "int64", "uint8", "float", "double", "string", "binary", "date32", "null"]


def write(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=3)


@given(types=st.lists(st.sampled_from(TYPES), min_size=1, max_size=4))
def test_files_of_several_types_are_refused_when_they_are_opened(
    tmp_path_factory: pytest.TempPathFactory, types: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(types):
        write(folder / f"{number}.parquet", x=[1, 2], y=pa.array([None, None], name))
    if len(set(types)) == 1:
        assert len(ParquetSource(folder)) == 2 * len(types)
        return
    other = next(number for number, name in enumerate(types) if name != types[0])
    one, two = (re.escape(str(pa.type_for_alias(types[number]))) for number in (0, other))
    with pytest.raises(
        DataError, match=rf"'y' is {one} in \S*/0.parquet, {two} in \S*/{other}.parquet; one type in all"
    ):
        ParquetSource(folder)
    assert len(ParquetSource(folder, ["x"])) == 2 * len(types), "a column that is not read does not matter"


def test_ways_of_storing_that_give_the_same_values_are_one_type(tmp_path: Path) -> None:
    texts, lists = ["a", "b", "a"], [[1, 2], [3], []]
    stored = [
        (pa.array(texts), pa.array([b"1", b"", b"3"]), pa.array(lists)),
        (pa.array(texts).dictionary_encode(), pa.array([b"1", b"", b"3"], "large_binary"), pa.array(lists)),
        (
            pa.array(texts, "large_string"),
            pa.array([b"1", b"", b"3"]),
            pa.array(lists, pa.large_list(pa.int64())),
        ),
    ]
    for number, (text, data, numbers) in enumerate(stored):
        write(tmp_path / f"{number}.parquet", text=text, data=data, numbers=numbers)
    source = ParquetSource(tmp_path)
    for index in range(9):
        row = source[index]
        assert row["text"] == texts[index % 3]
        assert bytes(row["data"]) == [b"1", b"", b"3"][index % 3]
        assert row["numbers"].tolist() == lists[index % 3]


def test_columns_that_come_and_go_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", x=[1], y=[2])
    write(tmp_path / "1.parquet", x=[1])
    with pytest.raises(DataError, match=r"columns: 'y' is not in \S*1.parquet; one of x"):
        ParquetSource(tmp_path)
    write(tmp_path / "1.parquet", y=[1], x=[2], z=[3])
    with pytest.raises(
        DataError, match=r"columns: 'z' is in \S*1.parquet, but not in \S*0.parquet; the same"
    ):
        ParquetSource(tmp_path)
    source = ParquetSource(tmp_path, ["x", "y"])
    assert [source[index] for index in (0, 1)] == [{"x": 1, "y": 2}, {"x": 2, "y": 1}]
    pq.write_table(pa.table([[1], [2], [3]], ["x", "y", "x"]), tmp_path / "1.parquet")
    with pytest.raises(DataError, match=r"columns: 'x' stands twice in \S*1.parquet"):
        ParquetSource(tmp_path, ["x"])
    assert len(ParquetSource(tmp_path, ["y"])) == 2


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint64", "float16", "float32", "float64"])
def test_numbers_keep_their_dtype_beside_nulls(tmp_path: Path, dtype: str) -> None:
    values = [1, 2, 3, None, 5, 6]
    write(tmp_path / "0.parquet", y=pa.array(values, pa.from_numpy_dtype(np.dtype(dtype))))
    source = ParquetSource(tmp_path)
    given_values = [source[index]["y"] for index in range(6)]
    assert given_values == values
    assert {value.dtype for value in given_values if value is not None} == {np.dtype(dtype)}


def test_what_is_null_is_none_and_is_named_where_a_number_is_needed(tmp_path: Path) -> None:
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    write(
        tmp_path / "0.parquet",
        img=pa.array([{"bytes": b"1", "path": "a"}, None, {"bytes": None, "path": "c"}], picture),
        scores=pa.array([[1.0, 2.0], None, [1.0, None]]),
        y=pa.array([1, None, 3]),
    )
    source = ParquetSource(tmp_path, ["img", "y"])
    assert [source[index]["img"] for index in range(3)] == [b"1", None, None]

    class Scored:
        def source(self, split: str) -> ParquetSource:
            return ParquetSource(tmp_path, ["scores", "y"])

        def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
            return example

    def prepared(index: int) -> Any:
        return InlinePreparer(Scored(), 0).collect(
            PrepareRequest("train", np.zeros(1, int), np.array([index]))
        )

    with pytest.raises(DataError, match=r"scores: None \(a missing value\).*example 1 \(\S*0.parquet:1\)"):
        prepared(1)
    with pytest.raises(ExampleError, match=r"example 2 \(\S*0.parquet:2\): .* a null in a list of double"):
        prepared(2)


def test_lists_of_lists_are_arrays_where_they_are_equally_long(tmp_path: Path) -> None:
    lists = [[[1, 2], [3, 4]], [[5, 6]], [[1], [2, 3]], []]
    write(tmp_path / "0.parquet", y=pa.array(lists, pa.list_(pa.list_(pa.int32()))))
    source = ParquetSource(tmp_path)
    assert [source[index]["y"].shape for index in range(4)] == [(2, 2), (1, 2), (2,), (0,)]
    assert source[0]["y"].dtype == np.int32
    assert [[part.tolist() for part in source[index]["y"]] for index in range(4)] == lists


def test_values_of_other_types_are_arrow_s(tmp_path: Path) -> None:
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12).reshape(2, 2, 3))
    write(
        tmp_path / "0.parquet",
        decimal=pa.array([Decimal("1.50"), Decimal("2.25")]),
        day=pa.array([1, 2], pa.date32()),
        code=pa.array([b"ab", b"cd"], pa.binary(2)),
        kind=pa.array([3, 4]).dictionary_encode(),
        tensor=tensor,
        words=pa.array([["a", None], ["b"]]),
    )
    row = ParquetSource(tmp_path)[1]
    assert row["decimal"] == Decimal("2.25")
    assert (str(row["day"]), row["code"], row["kind"]) == ("1970-01-03", b"cd", 4)
    assert row["kind"].dtype == np.int64
    assert row["tensor"].tolist() == np.arange(6, 12).reshape(2, 3).tolist()
    assert ParquetSource(tmp_path)[0]["words"].tolist() == ["a", None]


def test_columns_in_several_pieces_are_read_by_row() -> None:
    column = parquet._column_of(pa.chunked_array([pa.array([b"a", b"b"]), pa.array([b"c"])]))
    assert [bytes(column(row)) for row in (2, 0, 1)] == [b"c", b"a", b"b"]


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(300):
        write(tmp_path / f"{number:04d}.parquet", y=[number])
    resource.setrlimit(resource.RLIMIT_NOFILE, (260, hard))
    try:
        source = ParquetSource(tmp_path)
        assert [source[index]["y"] for index in range(300)] == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_changes_or_vanishes_is_named(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.parquet", y=list(range(6)))
    source = ParquetSource(tmp_path, cache_bytes=1)
    assert source[0]["y"] == 0
    write(tmp_path / "0.parquet", y=list(range(9)))
    with pytest.raises(DataError, match=r"files: \S*0.parquet: changed while it was in use"):
        source[3]
    source = ParquetSource(tmp_path, cache_bytes=1)
    source._opened._opened.clear()
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(DataError, match=r"files: \S*1.parquet: No such file or directory; data that stay"):
        source[9]


def with_classes(path: Path, names: list[str] | None) -> None:
    features = {"y": {"names": names, "_type": "ClassLabel"}, "x": {"dtype": "int64", "_type": "Value"}}
    noted = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    pq.write_table(pa.table({"x": [1], "y": [0]}).replace_schema_metadata(noted), path)


def test_files_that_number_other_classes_are_refused(tmp_path: Path) -> None:
    with_classes(tmp_path / "0.parquet", ["cat", "dog"])
    with_classes(tmp_path / "1.parquet", None)
    assert ParquetSource(tmp_path).classes == ("cat", "dog")
    assert ParquetSource(tmp_path, ["x"]).classes is None
    with_classes(tmp_path / "2.parquet", ["dog", "cat"])
    with pytest.raises(
        DataError, match=r"'y' numbers the classes cat, dog in \S*0.parquet, dog, cat in \S*2.par"
    ):
        ParquetSource(tmp_path)
    assert len(ParquetSource(tmp_path, ["x"])) == 3


def test_hidden_files_are_left_out_and_said(tmp_path: Path) -> None:
    for name in ("0.parquet", "._0.parquet", ".1.parquet"):
        write(tmp_path / name, y=[1])
    for source in (ParquetSource(tmp_path), ParquetSource(tmp_path / "*.parquet")):
        assert len(source) == 1
        assert source.skipped[0].startswith("hidden or system files: 2 (")
    assert len(ParquetSource(tmp_path / ".1.parquet")) == 1, "a file that is named is read"


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", y=pa.array([], "int64"))
    with pytest.raises(DataError, match=r"parquet: \S*: no rows in 1 files; at least one row"):
        ParquetSource(tmp_path)

"""Sources: rows by number, errors that name the file, fingerprints that notice a change."""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_echo import (
    ArraySource,
    DataError,
    ExampleError,
    ImageFolderSource,
    InlinePreparer,
    ParquetSource,
    PrepareRequest,
    ShuffledOrder,
    TextSource,
    images,
)
from data_echo.sources import files


def jpeg(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_parquet(path: Path, first: int, rows: int, damaged: int | None = None) -> None:
    pictures = [{"bytes": jpeg(first + row), "path": f"{first + row}.jpg"} for row in range(rows)]
    if damaged is not None:
        pictures[damaged]["bytes"] = pictures[damaged]["bytes"][:200]
    table = pa.table(
        {
            "img": pa.array(pictures),
            "label": pa.array(np.arange(first, first + rows)),
            "name": pa.array([f"n{first + row}" for row in range(rows)]),
            "scores": pa.array([[float(first + row), 1.0] for row in range(rows)]),
        }
    )
    pq.write_table(table, path, row_group_size=7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train-0.parquet", 0, 20)
    write_parquet(tmp_path / "train-1.parquet", 20, 10)
    write_parquet(tmp_path / "test-0.parquet", 100, 5)
    return tmp_path


def test_parquet_rows(folder: Path) -> None:
    source = ParquetSource(folder / "train-*.parquet")
    assert len(source) == 30
    for index in (0, 6, 7, 19, 20, 29, 3):
        row = source[index]
        assert bytes(row["img"]) == jpeg(index)
        assert row["label"] == index
        assert row["name"] == f"n{index}"
        assert row["scores"].tolist() == [index, 1.0]
    assert source.origin(23).endswith("train-1.parquet:3")
    assert source.origin(8).endswith("train-0.parquet:8")
    with pytest.raises(IndexError):
        source[30]


def test_parquet_with_hardly_any_cache(folder: Path) -> None:
    source = ParquetSource(folder / "train-*.parquet", ["label"], cache_bytes=1)
    assert [source[index]["label"] for index in (29, 0, 29, 15)] == [29, 0, 29, 15]
    assert len(source._cache) == 1


def test_parquet_that_outgrows_its_cache_is_read_once_in_blocks(folder: Path) -> None:
    whole = ParquetSource(folder / "train-*.parquet")
    assert whole.rows_together() == 1
    source = ParquetSource(folder / "train-*.parquet", cache_bytes=whole._bytes() // 2)
    assert source.rows_together() == 7
    assert ParquetSource(folder, ["label"], cache_bytes=whole._bytes() // 2).rows_together() == 1

    def groups_read(block: int) -> int:
        read: list[int] = []
        source = ParquetSource(folder / "train-0.parquet", cache_bytes=1)  # one group at a time
        group = source._readers[0].read_row_group
        source._readers[0] = Spied(source._readers[0], lambda *a, **k: read.append(a[0]) or group(*a, **k))
        for index in ShuffledOrder(20, 1, 0, block=block, window=1).example_of(0, np.arange(20))[1]:
            assert source[int(index)]["label"] == index
        return len(read)

    assert groups_read(7) == 3
    assert groups_read(1) > 6


class Spied:
    """A reader of a Parquet file that is watched."""

    def __init__(self, reader: Any, read_row_group: Any) -> None:
        self.metadata, self.schema_arrow = reader.metadata, reader.schema_arrow
        self.read_row_group = read_row_group


def test_parquet_folder_and_files_and_addresses(folder: Path) -> None:
    assert len(ParquetSource(folder)) == 35
    assert len(ParquetSource([folder / "train-1.parquet"])) == 10
    address = ParquetSource(f"file://{folder}/train-*.parquet", ["label"])
    assert len(address) == 30
    assert address[25]["label"] == 25
    assert address.fingerprint() == ParquetSource(folder / "train-*.parquet", ["label"]).fingerprint()


def test_parquet_fingerprint_notices_a_change(folder: Path) -> None:
    before = ParquetSource(folder).fingerprint()
    assert before["rows"] == 35
    assert next((file["name"], file["rows"]) for file in before["files"]) == ("test-0.parquet", 5)
    assert before == ParquetSource(folder).fingerprint()
    write_parquet(folder / "train-1.parquet", 21, 10)
    after = ParquetSource(folder).fingerprint()
    assert before["hash"] != after["hash"]


def test_nulls_are_given_as_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": pa.array([1, None, 3])}), tmp_path / "a.parquet")
    assert [ParquetSource(tmp_path)[row]["label"] for row in range(3)] == [1, None, 3]


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        ParquetSource(folder / "nothing.parquet")
    with pytest.raises(DataError, match=r"no \.parquet files there"):
        ParquetSource(folder / "valid-*.parquet")
    with pytest.raises(DataError, match=r"columns: 'lable' is not in .*; one of img, label, name, scores"):
        ParquetSource(folder, ["lable"])
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="bad"):
        ParquetSource(tmp_path / "bad.parquet")


class Pictures:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def source(self, split: str) -> ParquetSource:
        return ParquetSource(self.folder / f"{split}-*.parquet")

    def prepare(self, example: dict, draw: object) -> dict:
        return {"image": images.decode(example["img"]), "label": example["label"]}


def test_pictures_reach_the_fast_decoder_as_it_likes_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg")
    monkeypatch.setattr(images, "_decode_with_pil", lambda data: pytest.fail("the slow decoder was asked"))
    assert images.decode(ParquetSource(folder)[8]["img"]).shape == (32, 32, 3)


def test_a_damaged_picture_is_named_with_file_and_row(folder: Path) -> None:
    write_parquet(folder / "train-1.parquet", 20, 10, damaged=4)
    preparer = InlinePreparer(Pictures(folder), 0)
    good = PrepareRequest("train", np.zeros(3, int), np.array([1, 23, 25]))
    assert preparer.collect(good)["image"].shape == (3, 32, 32, 3)
    with pytest.raises(
        ExampleError, match=r"train: example 24 \(.*train-1.parquet:4\): DataError: image: 200 bytes"
    ):
        preparer.collect(PrepareRequest("train", np.zeros(2, int), np.array([1, 24])))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(32, 32), (17, 41), (120, 160)])
def test_both_decoders_give_the_same_pixels(size: tuple[int, int], mode: str) -> None:
    pytest.importorskip("simplejpeg")
    for seed in range(5):
        data = jpeg(seed, size, mode)
        assert np.array_equal(images.decode(data), images._decode_with_pil(data))
        assert images.decode(memoryview(data)).shape == (*size, 3)


@pytest.mark.parametrize("decoder", ["simplejpeg", "PIL"])
def test_damaged_pictures_are_refused(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if decoder == "PIL":
        monkeypatch.setattr(images, "simplejpeg", None)
    whole = jpeg(0)
    for data in (b"", b"text", whole[:3], whole[: len(whole) // 2]):
        with pytest.raises(DataError, match=f"image: {len(data)} bytes cannot be decoded"):
            images.decode(data)


def test_png_is_read_and_resized() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((10, 20, 3), 7, np.uint8)).save(file, "PNG")
    image = images.decode(file.getvalue())
    assert image.shape == (10, 20, 3)
    assert images.resize(image, 5, 8).shape == (5, 8, 3)
    assert (images.resize(image, 5, 8) == 7).all()


def test_arrays() -> None:
    source = ArraySource({"x": np.arange(12).reshape(4, 3), "y": np.arange(4.0)})
    assert len(source) == 4
    assert source[2]["x"].tolist() == [6, 7, 8]
    other = ArraySource({"x": np.arange(12).reshape(4, 3), "y": np.arange(4.0) + 1})
    assert source.fingerprint()["rows"] == 4
    assert source.fingerprint() != other.fingerprint()
    with pytest.raises(DataError, match=r"lengths {'x': 3, 'y': 4}"):
        ArraySource({"x": np.zeros(3), "y": np.zeros(4)})


def test_of_large_arrays_rows_evenly_spread_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_echo.sources.source._HASHED_BYTES", 80)
    monkeypatch.setattr("data_echo.sources.source._HASHED_AT_ONCE", 24)
    x = np.arange(200, dtype=np.int64)
    changed, before = [], ArraySource({"x": x}).fingerprint()
    for row in range(200):
        other = x.copy()
        other[row] += 1
        changed += [row] * (ArraySource({"x": other}).fingerprint() != before)
    assert changed == [199 * number // 9 for number in range(10)]


def test_arrays_from_files(tmp_path: Path) -> None:
    x, y = np.arange(12).reshape(4, 3), np.arange(4.0)
    np.savez(tmp_path / "both.npz", x=x, y=y)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    packed = ArraySource.from_files(tmp_path / "both.npz")
    mapped = ArraySource.from_files({"x": tmp_path / "x.npy", "y": tmp_path / "y.npy"})
    assert packed[3]["x"].tolist() == mapped[3]["x"].tolist() == [9, 10, 11]
    assert packed.fingerprint() == mapped.fingerprint()
    for wrong in (tmp_path / "none.npz", {"x": tmp_path / "none.npy"}, tmp_path / "x.npy"):
        with pytest.raises(DataError, match=r"source: .*; a .npz file, or names with .npy files"):
            ArraySource.from_files(wrong)


def test_image_folders(tmp_path: Path) -> None:
    for name, number in [("dog/b.jpg", 1), ("cat/x/c.JPG", 2), ("cat/a.png", 3), ("cat/notes.txt", 4)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(number))
    source = ImageFolderSource(tmp_path)
    assert source.classes == ("cat", "dog")
    assert [int(source[index]["label"]) for index in range(len(source))] == [0, 0, 1]
    assert source[2]["image"] == jpeg(1)
    assert source.origin(2).endswith("dog/b.jpg")
    before = source.fingerprint()
    assert before["rows"] == 3
    (tmp_path / "dog/b.jpg").rename(tmp_path / "dog/d.jpg")
    assert ImageFolderSource(tmp_path).fingerprint()["hash"] != before["hash"]
    with pytest.raises(DataError, match="no images in subfolders"):
        ImageFolderSource(tmp_path / "dog")
    with pytest.raises(DataError, match="no such folder"):
        ImageFolderSource(tmp_path / "horse")


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    window=st.integers(1, 12),
    stride=st.one_of(st.none(), st.integers(1, 15)),
)
def test_text_windows(sizes: list[int], window: int, stride: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        texts = [
            bytes(np.random.default_rng(n).integers(0, 256, size, np.uint8)) for n, size in enumerate(sizes)
        ]
        for number, text in enumerate(texts):
            (Path(folder) / f"{number}.txt").write_bytes(text)
        step = stride or window
        expected = [text[n : n + window] for text in texts for n in range(0, len(text) - window + 1, step)]
        if not expected:
            with pytest.raises(DataError, match="the longest file has"):
                TextSource(folder, window, stride)
            return
        source = TextSource(folder, window, stride)
        assert [source[index]["bytes"].tobytes() for index in range(len(source))] == expected
        file, first = source.origin(len(source) - 1).rsplit(":", 1)
        assert Path(file).read_bytes()[int(first) : int(first) + window] == expected[-1]


def test_many_texts_keep_few_files_open_and_a_change_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_OPEN_FILES", 2)
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(name * 8)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "._a.txt").write_text("not a text at all")
    source = TextSource(tmp_path, 4)
    before = len(os.listdir("/proc/self/fd"))
    assert (
        b"".join(source[index]["bytes"].tobytes() for index in range(8))
        == b"aaaaaaaabbbbbbbbccccccccdddddddd"
    )
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert source.skipped == (
        "hidden or system files: 1 (" + str(tmp_path / "._a.txt") + ")",
        "files shorter than a window: 1 (" + str(tmp_path / "empty.txt") + ")",
    )
    os.truncate(tmp_path / "c.txt", 2)  # what is mapped into memory would end the process
    with pytest.raises(DataError, match=r"files: \S*c.txt: changed while it was in use"):
        source[5]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"files: \S*a.txt: No such file"):
        source[0]
    assert len(TextSource([tmp_path / "._a.txt"], 4)) == 4, "a file that is named is read"


def test_real_text(shared_data: Path) -> None:
    source = TextSource(shared_data / "tinyshakespeare" / "input.txt", 65, 64)
    assert source[0]["bytes"].tobytes().startswith(b"First Citizen:")
    assert source[0]["bytes"][64] == source[1]["bytes"][0]
    assert source.fingerprint()["rows"] == len(source)


def test_real_pictures(shared_data: Path) -> None:
    source = ParquetSource(shared_data / "cifar10" / "train-*.parquet")
    assert len(source) == 50_000
    rows = [source[index] for index in range(0, 50_000, 5000)]
    assert {images.decode(row["img"]).shape for row in rows} == {(32, 32, 3)}
    assert all(0 <= row["label"] < 10 for row in rows)


class Ragged(Pictures):
    def prepare(self, example: dict, draw: object) -> dict:
        label = int(example["label"])
        return {"x": np.zeros(1 + label % 2)} if label < 5 else {"y": np.zeros(1)}


def test_examples_that_do_not_fit_together_are_named(folder: Path) -> None:
    preparer = InlinePreparer(Ragged(folder), 0)
    with pytest.raises(DataError, match=r"train: prepare: x: shapes \[\(1,\), \(2,\)\]; one shape for all"):
        preparer.collect(PrepareRequest("train", np.zeros(2, int), np.array([0, 1])))
    with pytest.raises(DataError, match="train: prepare: x: missing in some examples"):
        preparer.collect(PrepareRequest("train", np.zeros(2, int), np.array([0, 9])))


@given(place=st.floats(0, 1, exclude_max=True), is_cut=st.booleans(), is_compressed=st.booleans())
def test_a_damaged_archive_is_refused_or_whole(place: float, is_cut: bool, is_compressed: bool) -> None:
    x = np.arange(300)
    stream = io.BytesIO()
    (np.savez_compressed if is_compressed else np.savez)(stream, x=x)
    data = bytearray(stream.getvalue())
    where = int(place * len(data))
    if is_cut:
        del data[where:]
    else:
        data[where] ^= 0x55
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        path.write_bytes(data)
        with contextlib.suppress(DataError):
            source = ArraySource.from_files(path)
            assert [[*source[row].values()] for row in range(len(source))] == [[value] for value in x]

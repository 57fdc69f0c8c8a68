"""Tar shards: rows by number, headers read once, chunks fetched once from an address."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from data_echo import DataError, ShuffledOrder, TarSource
from data_echo.sources import files

pytestmark = pytest.mark.usefixtures("cache")


def payload(key: int) -> bytes:
    return np.random.default_rng(key).bytes(900 + key)


def write_shard(path: Path, keys: range, mode: str = "w:") -> None:
    with tarfile.open(path, mode) as tar:
        for key in keys:
            for ending, data in (("jpg", payload(key)), ("cls", str(key % 10).encode())):
                member = tarfile.TarInfo(f"pictures/{key:06d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train-0.tar", range(5))
    write_shard(folder / "train-1.tar", range(5, 8))
    write_shard(folder / "train-2.tar", range(0))
    return folder


def no_headers(*args: object, **settings: object) -> None:
    pytest.fail("the headers were read again")


@pytest.mark.parametrize("address", ["{}/train-*.tar", "file://{}"])
def test_examples_by_number(shards: Path, address: str) -> None:
    source = TarSource(address.format(shards))
    assert len(source) == 8
    for index in (7, 0, 5):
        expected = {"__key__": f"pictures/{index:06d}", "jpg": payload(index), "cls": str(index).encode()}
        assert source[index] == expected
    assert source.origin(6).endswith("train-1.tar:pictures/000006")
    assert [file["rows"] for file in source.fingerprint()["files"]] == [5, 3, 0]
    for index in (-1, 8):
        with pytest.raises(IndexError):
            source[index]


def test_a_packed_shard_is_refused(shards: Path) -> None:
    write_shard(shards / "packed.tar", range(3), "w:gz")
    with pytest.raises(DataError, match=r"shards: .*packed.tar: .*; a whole, uncompressed tar file"):
        TarSource(shards / "packed.tar")


def test_names_of_any_kind(shards: Path) -> None:
    with tarfile.open(shards / "odd.tar", "w:") as tar:
        for name in ("ä.b.c", os.fsdecode(b"\xff.jpg"), "plain"):
            tar.addfile(tarfile.TarInfo(name))
    for _ in range(2):  # read from the headers, then from the cache
        source = TarSource(shards / "odd.tar")
        assert [sorted(source[row]) for row in range(3)] == [
            ["__key__", "b.c"],
            ["__key__", "jpg"],
            ["", "__key__"],
        ]
        assert [source[row]["__key__"] for row in range(3)] == ["ä", os.fsdecode(b"\xff"), "plain"]


@pytest.mark.parametrize("address", ["{}/train-*.tar", "file://{}"])
def test_headers_are_read_once(
    shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    first = TarSource(address.format(shards))
    assert len(list(cache.iterdir())) == 3, "an index for each shard, and no draft of one"
    assert cache.stat().st_mode & 0o077 == 0, "nobody else may write there"
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", no_headers)
        again = TarSource(address.format(shards))
        assert [again[index] for index in range(8)] == [first[index] for index in range(8)]
        assert again.fingerprint() == first.fingerprint()


def test_a_changed_shard_is_read_anew(shards: Path) -> None:
    before = TarSource(shards).fingerprint()
    status = (shards / "train-1.tar").stat()
    write_shard(shards / "train-1.tar", range(15, 18))  # as large as before
    assert (shards / "train-1.tar").stat().st_size == status.st_size
    os.utime(shards / "train-1.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    source = TarSource(shards)
    assert source[5]["__key__"] == "pictures/000015"
    assert source.fingerprint()["hash"] != before["hash"]


@pytest.mark.parametrize("damage", [b"", b"nonsense", "half"])
def test_a_damaged_index_is_made_anew(shards: Path, cache: Path, damage: bytes | str) -> None:
    TarSource(shards)
    for kept in cache.iterdir():
        whole = kept.read_bytes()
        kept.write_bytes(whole[: len(whole) // 2] if isinstance(damage, str) else damage)
    for _ in range(2):
        source = TarSource(shards)
        assert [source[index]["jpg"] for index in range(8)] == [payload(index) for index in range(8)]


def test_what_cannot_tell_of_changes_is_read_each_time(
    shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHANGES", ())
    assert len(TarSource(f"file://{shards}")) == 8
    assert not cache.exists()


def test_shards_are_read_without_a_cache(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert len(TarSource(shards)) == 8


def test_many_shards_keep_few_files_open(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_OPEN_FILES", 1)
    source = TarSource(shards)
    before = len(os.listdir("/proc/self/fd"))
    for index in (0, 7, 1, 6, 2, 5):
        assert source[index]["jpg"] == payload(index)
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_chunks_from_an_address_are_fetched_once_in_blocks(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 8000)  # some examples span two
    fetched: Counter[tuple[str, int]] = Counter()
    fetch = LocalFileSystem.cat_file

    def counting(self: LocalFileSystem, path: str, start: int, end: int) -> bytes:
        fetched[path, start] += 1
        return fetch(self, path, start, end)

    monkeypatch.setattr(LocalFileSystem, "cat_file", counting)
    write_shard(shards / "train-0.tar", range(120))
    address, shard_bytes = f"file://{shards}/train-0.tar", (shards / "train-0.tar").stat().st_size
    assert TarSource(address, cache_bytes=shard_bytes).rows_together() == 1

    def requests(block: int) -> int:
        fetched.clear()
        source = TarSource(address, cache_bytes=shard_bytes // 4)
        assert source.rows_together() == 120
        for index in ShuffledOrder(120, 1, 0, block=block, window=1).example_of(0, np.arange(120))[1]:
            assert source[int(index)]["jpg"] == payload(int(index))
        return fetched.total()

    chunks, blocks = shard_bytes // 8000 + 1, 12
    assert requests(10) <= chunks + blocks
    assert requests(1) > 2 * chunks
    assert TarSource(shards).rows_together() == 1

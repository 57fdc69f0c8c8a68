"""Members of shards of any kind: read rightly, or refused with their name."""

import io
import os
import subprocess
import tarfile
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_echo import DataError, TarSource
from data_echo.sources.skipped import is_hidden

pytestmark = pytest.mark.usefixtures("cache")


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"data", **more: Any) -> Any:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def shard(path: Path, *members: Any, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w:", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def examples(path: Path) -> list[dict[str, Any]]:
    source = TarSource(path)
    return [source[index] for index in range(len(source))]


LINK = {"linkname": "a.jpg"}
REFUSED = {
    "twice": ([member("a.jpg"), member("a.jpg")], "a.jpg stands there twice; each name once"),
    "twice, written differently": ([member("a.jpg"), member("./a.jpg")], r"\./a.jpg stands there twice"),
    "apart": (
        [member("a.jpg"), member("b.jpg"), member("a.cls")],
        "a.cls is apart from the other files of 'a'; the files of an example side by side",
    ),
    "symbolic link": (
        [member("a.jpg"), member("b.jpg", tarfile.SYMTYPE, **LINK)],
        "b.jpg is a symbolic link to a.jpg; plain files",
    ),
    "hard link to nothing": (
        [member("b.jpg", tarfile.LNKTYPE, **LINK)],
        "b.jpg links to a.jpg, which is not before it",
    ),
    "queue": ([member("a.jpg", tarfile.FIFOTYPE)], "a.jpg is no file"),
    "device": ([member("a.jpg", tarfile.CHRTYPE)], "a.jpg is no file"),
    "a type nobody knows": ([member("a.jpg", b"Q")], r"a.jpg is no file \(type b'Q'\)"),
    "key": ([member("a.__key__")], "a.__key__ ends like the key"),
    "none": ([], "no examples in 1 files"),
    "hidden alone": ([member("._a.jpg")], "no examples"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    members, message = REFUSED[kind]
    for _ in range(2):  # a refused shard is not kept in the cache
        with pytest.raises(DataError, match=rf"^shards: \S*x.tar: {message}"):
            TarSource(shard(tmp_path / "x.tar", *members))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_links_are_the_files_they_link_to(tmp_path: Path, form: int) -> None:
    one = member("a/0.jpg", data=b"one")
    two = member("a/1.jpg", tarfile.LNKTYPE, linkname="a/0.jpg")
    three = member("a/2.jpg", tarfile.LNKTYPE, linkname="./a/1.jpg")
    found = examples(shard(tmp_path / "x.tar", one, two, three, form=form))
    assert found == [{"__key__": f"a/{number}", "jpg": b"one"} for number in range(3)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_folders(tmp_path: Path, form: int) -> None:
    deep = "/".join(["folder"] * 30)
    path = shard(
        tmp_path / "x.tar",
        member(deep, tarfile.DIRTYPE),
        member(f"{deep}/{'n' * 200}.jpg", data=b"1"),
        member(f"{deep}/{'n' * 200}.cls", data=b"2"),
        member("A.jpg", data=b"3"),
        member("a.jpg", data=b"4"),
        member("b/a.jpg", data=b"5"),
        member("c.0.5.jpg", data=b"6"),
        form=form,
    )
    assert examples(path) == [
        {"__key__": f"{deep}/{'n' * 200}", "jpg": b"1", "cls": b"2"},
        {"__key__": "A", "jpg": b"3"},
        {"__key__": "a", "jpg": b"4"},
        {"__key__": "b/a", "jpg": b"5"},
        {"__key__": "c", "0.5.jpg": b"6"},
    ]


def test_names_with_a_dot_before_them_belong_together(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", member("./a.jpg", data=b"1"), member("a.cls", data=b"2"))
    assert examples(path) == [{"__key__": "./a", "jpg": b"1", "cls": b"2"}]


def test_hidden_and_system_members_are_left_out_and_said(tmp_path: Path) -> None:
    names = [
        "._000.jpg",
        "000.jpg",
        "d/.DS_Store",
        "d/._000.jpg",
        "d/000.jpg",
        "__MACOSX/d/._0.jpg",
        "d/Thumbs.db",
    ]
    path = shard(tmp_path / "x.tar", *map(member, names), member(".git/link", tarfile.SYMTYPE))
    for _ in range(2):  # from the headers, then from the cache
        source = TarSource(path)
        assert [source[index]["__key__"] for index in range(len(source))] == ["000", "d/000"]
        assert source.skipped == (
            "hidden or system members: 6 (._000.jpg, .git/link, __MACOSX/d/._0.jpg, ...)",
        )


def test_what_is_hidden() -> None:
    hidden = [".a", "a/.b/c.jpg", "._a.jpg", "__MACOSX", "a/Thumbs.db", "desktop.ini", "x/@eaDir/y.jpg"]
    assert all(map(is_hidden, hidden))
    assert not any(map(is_hidden, ["a.jpg", "./a.jpg", "../a", "a.b/c", "/x/y", "thumbs.jpg", "_a", "a."]))


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "0.bin", "wb") as file:
        file.truncate(10**6)
        file.seek(10**6)
        file.write(b"end")
    for form in ("gnu", "posix"):
        subprocess.run(
            ["tar", "--sparse", f"--format={form}", "-cf", "x.tar", "0.bin"], cwd=tmp_path, check=True
        )
        with pytest.raises(
            DataError, match=r"shards: \S*x.tar: 0.bin is stored as a sparse file; plain files"
        ):
            TarSource(tmp_path / "x.tar")
    subprocess.run(["tar", "-cf", "x.tar", "0.bin"], cwd=tmp_path, check=True)
    assert examples(tmp_path / "x.tar")[0]["bin"] == (tmp_path / "0.bin").read_bytes()


def test_joined_archives_are_refused(tmp_path: Path) -> None:
    one, two = (shard(tmp_path / f"{n}.tar", member(f"{n}.jpg")).read_bytes() for n in range(2))
    (tmp_path / "x.tar").write_bytes(one + two)
    with pytest.raises(DataError, match=r"x.tar: goes on after its end at byte 1024; one archive in a file"):
        TarSource(tmp_path / "x.tar")


NAMES = [f"{number}.{ending}" for number in range(4) for ending in ("jpg", "cls")]


@settings(max_examples=150)
@given(form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), data=st.data())
def test_a_cut_or_damaged_shard_is_refused_or_whole(form: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        path = Path(folder) / "x.tar"
        whole = shard(
            path, *(member(name, data=name.encode() * 200) for name in NAMES), form=form
        ).read_bytes()
        expected, end = examples(path), len(NAMES) * (512 + 1024)
        changed = bytearray(whole)
        if data.draw(st.booleans()):
            del changed[data.draw(st.integers(0, len(whole) - 1)) :]
        else:  # a byte of a header, which its checksum guards
            place = data.draw(st.integers(0, len(NAMES) - 1)) * 1536 + data.draw(st.integers(0, 511))
            changed[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(changed)
        with nullcontext() if end + 512 <= len(changed) < len(whole) else suppress(DataError):
            assert examples(path) == expected, "never fewer or other examples"


def test_a_shard_that_changes_during_the_run_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", member("a.jpg"), member("b.jpg"))
    source = TarSource(path)
    assert source[0]["jpg"] == b"data"
    with open(path, "r+b") as file:
        file.truncate(700)
    with pytest.raises(DataError, match=r"files: \S*x.tar: changed while it was in use"):
        source[1]


def test_a_shard_replaced_by_one_as_old_and_large_is_read_anew(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", member("a.jpg"))
    status = path.stat()
    assert examples(path)[0]["__key__"] == "a"
    shard(tmp_path / "y.tar", member("b.jpg")).replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert examples(path)[0]["__key__"] == "b"

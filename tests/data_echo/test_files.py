"""Which files a path, a folder or a pattern stands for: alike for every source."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_echo import DataError
from data_echo.sources.files import FileSet, _alternatives, one_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ["a-000", "a-001", "a-002", "a-003", "b-000", "odd[1]", "odd{x,y}"]:
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "c.txt").write_text("c")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(files: str | Path | list[str], folder: Path) -> list[str]:
    return [os.path.relpath(name, folder) for name in FileSet(files, ".txt").names]


@pytest.mark.parametrize("prefix", ["", "~/", "{here}/"])
@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a-000.txt", ["a-000.txt"]),
        ("a-*.txt", ["a-000.txt", "a-001.txt", "a-002.txt", "a-003.txt"]),
        ("a-00?.txt", ["a-000.txt", "a-001.txt", "a-002.txt", "a-003.txt"]),
        ("a-00[12].txt", ["a-001.txt", "a-002.txt"]),
        ("a-{001..003}.txt", ["a-001.txt", "a-002.txt", "a-003.txt"]),
        ("{b,a}-000.txt", ["b-000.txt", "a-000.txt"]),
        ("{a,b}-*.txt", ["a-000.txt", "a-001.txt", "a-002.txt", "a-003.txt", "b-000.txt"]),
        ("deep/er", ["deep/er/c.txt"]),
        ("deep/**/*.txt", ["deep/er/c.txt"]),
        ("*/er/c.txt", ["deep/er/c.txt"]),
        ("odd[1].txt", ["odd[1].txt"]),
        ("odd{x,y}.txt", ["odd{x,y}.txt"]),
    ],
)
def test_a_pattern_finds_the_same_files_wherever_it_begins(folder, prefix, pattern, found):
    path = prefix.format(here=folder) + pattern
    assert names(path, folder) == found
    assert names([path], folder) == found
    assert names(Path(path), folder) == found


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a-004.txt", r"files: a-004.txt: no such file; "),
        ("c-*.txt", r"files: c-\*.txt: no .txt files there; "),
        ("a-{002..005}.txt", r"files: a-004.txt \(of a-\{002..005\}.txt\): no such file; "),
        ("{a,c}-000.txt", r"files: c-000.txt \(of \{a,c\}-000.txt\): no such file; "),
        ("deep", r"files: deep: no .txt files there; "),
        ("~nobody-here/a.txt", r"files: ~nobody-here/a.txt: no user ~nobody-here is known here; "),
        ("a-{3..1}.txt", r"\{3..1\} counts no files"),
        ("a-{0..999999999}.txt", r"\{0..999999999\} counts no files, or more than 100000; "),
        ("{0..999}{0..999}{0..999}", r"stands for more than 100000 files; name fewer"),
        ("{a,b}" * 60, r"stands for more than 100000 files; name fewer"),
    ],
)
def test_what_is_missing_or_too_much_is_said(folder, pattern, said):
    for files in (pattern, [pattern], ["a-000.txt", pattern]):
        with pytest.raises(DataError, match=said):
            FileSet(files, ".txt")


def test_nothing_at_all_is_no_set_of_files():
    with pytest.raises(DataError, match=r"no \.txt files there"):
        FileSet([], ".txt")


def test_what_can_be_one_path_only_refuses_patterns(folder):
    assert one_path("~/deep") == folder / "deep"
    assert one_path("odd[1].txt") == Path("odd[1].txt")
    for pattern in ("a-*", "a-{0..3}", "{a,b}"):
        with pytest.raises(DataError, match="a pattern, where one path is wanted; write it out"):
            one_path(pattern)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 4))
def test_counted_names_are_as_wide_as_they_are_written(first, more, width):
    texts = [f"{number:0{width}d}" for number in range(first, first + more + 1)]
    written = f"x{{{first:0{width}d}..{first + more:0{width}d}}}y"
    assert _alternatives(written) == [f"x{text}y" for text in texts]

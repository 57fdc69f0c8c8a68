"""Sets of files, local or at any fsspec address."""

from __future__ import annotations

import glob
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_echo.errors import DataError

_BRACES = re.compile(r"\{(?:(?P<first>\d{1,9})\.\.(?P<last>\d{1,9})|(?P<texts>[^{},]*(?:,[^{},]*)+))\}")
_MOST_FILES = 100_000  # of one source
_OPEN_FILES = 128  # at once, of one source
_PIECE_BYTES = 4 * 2**20  # fetched by one request
_CHANGES = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")


class FileSet:
    """Files in the order of their names.

    Args:
        files: a folder, a pattern, a file, or several of these; local paths or fsspec addresses
            (`s3://bucket/folder`). `~` is the home folder; patterns hold `*`, `?`, `[a-z]`, `{a,b}` or
            `{000..003}`, and all that the last two stand for must be there.
        ending: of the files that count in a folder.

    Raises:
        DataError: nothing is there, or a part of it is missing.
    """

    def __init__(self, files: str | Path | Sequence[str | Path], ending: str) -> None:
        several = [files] if isinstance(files, str | Path) else list(files)
        self.names = [name for each in several for name in _found(str(each), ending)]
        if not self.names:
            raise DataError(f"files: {files}: names no file; a folder, a file, or a pattern: *{ending}")

    def open(self, name: str) -> Any:
        """A file object for reading bytes, seekable."""
        if "://" not in name:
            return open(name, "rb")
        import fsspec

        return fsspec.open(name, "rb").open()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        if "://" not in name:
            return Path(name).stat().st_size
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(name)
        return int(filesystem.size(path))

    def version(self, name: str) -> str | None:
        """A text that changes when the file does; None where its filesystem cannot tell."""
        if "://" not in name:
            status = Path(name).stat()
            return f"{Path(name).resolve()} {status.st_size} {status.st_mtime_ns}"
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(name)
        told = filesystem.info(path)
        changes = [(key, told[key]) for key in _CHANGES if told.get(key)]
        return f"{name} {told['size']} {changes}" if changes else None

    def described(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Name, size and rows of every file, for a fingerprint; without folders, so that data may move."""
        return [
            {"name": name.rsplit("/", 1)[-1], "bytes": self.size(name), "rows": count}
            for name, count in zip(self.names, rows, strict=True)
        ]


class Stretches:
    """Random access to the bytes of files.

    Local files are read as they are asked for; the system keeps what is read often. From an address whole
    pieces of 4 MiB are fetched, since every request takes its time, and the latest are kept.

    Args:
        cache_bytes: of pieces, at most.
    """

    def __init__(self, cache_bytes: int) -> None:
        self._most_pieces = max(1, cache_bytes // _PIECE_BYTES)
        self._pieces: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._opened: OrderedDict[str, Any] = OrderedDict()

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Some bytes of a file."""
        if "://" not in name:
            return os.pread(self._file(name).fileno(), size, offset)
        pieces = range(offset // _PIECE_BYTES, (offset + size - 1) // _PIECE_BYTES + 1)
        data = b"".join(self._piece(name, number) for number in pieces)
        begin = offset % _PIECE_BYTES
        return data[begin : begin + size]

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = open(name, "rb", buffering=0)  # noqa: SIM115 (closed when others are read)
        return _latest(self._opened, name, _OPEN_FILES)

    def _piece(self, name: str, number: int) -> bytes:
        if (name, number) not in self._pieces:
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(name)
            begin = number * _PIECE_BYTES
            self._pieces[name, number] = filesystem.cat_file(path, begin, begin + _PIECE_BYTES)
        return _latest(self._pieces, (name, number), self._most_pieces)


def _latest(kept: OrderedDict[Any, Any], key: Any, most: int) -> Any:
    """What stands under a key, now the latest; the oldest others are let go."""
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]


def one_path(where: str | Path) -> Path:
    """A path of this machine for what cannot be several: `~` is the home folder, patterns are refused."""
    path = _at_home(str(where))
    if _several(path) and not os.path.lexists(path):
        raise DataError(f"files: {where}: a pattern, where one path is wanted; write it out")
    return Path(path)


def _found(where: str, ending: str) -> list[str]:
    """The files that a path, a folder or a pattern stands for, each part of it at least one."""
    path = where if "://" in where else _at_home(where)
    is_there = "://" not in path and os.path.lexists(path)  # whatever characters its name has
    found = []
    for part in [path] if is_there else _alternatives(path):
        names = _matching(part, ending)
        if not names:
            of = "" if part == where else f" (of {where})"
            is_one = (is_there or not _several(part)) and "://" not in part and not os.path.isdir(part)
            wrong = "no such file" if is_one else f"no {ending} files there"
            raise DataError(f"files: {part}{of}: {wrong}; a folder, a file, or a pattern: *{ending}")
        found += names
    return found


def _matching(path: str, ending: str) -> list[str]:
    if "://" in path:
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(path)
        is_one = _several(inner) or inner.endswith(ending)
        pattern = inner if is_one else f"{inner.rstrip('/')}/*{ending}"
        return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern))
    if os.path.isdir(path):
        return sorted(str(inside) for inside in Path(path).glob(f"*{ending}"))
    if os.path.lexists(path):
        return [path] if os.path.isfile(path) else []
    return sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))


def _several(path: str) -> bool:
    return glob.has_magic(path) or _BRACES.search(path) is not None


def _at_home(path: str) -> str:
    """A path with its `~` replaced, on this machine."""
    whole = os.path.expanduser(path)
    if whole.startswith("~") and not os.path.lexists(whole):
        raise DataError(f"files: {path}: no user {whole.partition('/')[0]} is known here; write the path out")
    return whole


def _alternatives(path: str) -> list[str]:
    """What a path with `{a,b}` or `{000..003}` stands for, in order."""
    waiting, whole = [path], []
    while waiting:
        path = waiting.pop(0)
        match = _BRACES.search(path)
        if match is None:
            whole.append(path)
            continue
        texts = match["texts"].split(",") if match["texts"] else _counted(path, match["first"], match["last"])
        waiting[:0] = [path[: match.start()] + text + path[match.end() :] for text in texts]
        if len(waiting) + len(whole) > _MOST_FILES:
            raise DataError(f"files: {path}: stands for more than {_MOST_FILES} files; name fewer")
    return whole


def _counted(path: str, first: str, last: str) -> list[str]:
    """The numbers from first to last, as wide as they are written."""
    if int(last) - int(first) not in range(_MOST_FILES):
        wrong = f"{{{first}..{last}}} counts no files, or more than {_MOST_FILES}"
        raise DataError(f"files: {path}: {wrong}; {{000..127}} counts upwards")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]

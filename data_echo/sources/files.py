"""Sets of files, local or at any fsspec address."""

from __future__ import annotations

import glob
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_echo.errors import DataError
from data_echo.sources.skipped import is_hidden, skipped_line

_BRACES = re.compile(r"\{(?:(?P<first>\d{1,9})\.\.(?P<last>\d{1,9})|(?P<texts>[^{},]*(?:,[^{},]*)+))\}")
_MOST_FILES = 100_000  # of one source
_OPEN_FILES = 128  # the most that a source keeps open
_CHUNK_BYTES = 4 * 2**20  # fetched by one request
_CHANGES = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")


class FileSet:
    """Files in alphabetical order, or in the order in which they are given.

    Args:
        files: a folder, a pattern, a file, or several of these; local paths or fsspec addresses
            (`s3://bucket/folder`). `~` is the home folder; patterns hold `*`, `?`, `[a-z]`, `{a,b}` or
            `{000..003}`, and all that the last two stand for must be there.
        ending: the ending of the files that are taken from a folder.

    Attributes:
        names: of the files; of a folder or a pattern never hidden ones or a system's.
        skipped: a line on those, if any.

    Raises:
        DataError: nothing is there, or a part of it is missing.
    """

    def __init__(self, files: str | Path | Sequence[str | Path], ending: str) -> None:
        several = [files] if isinstance(files, str | Path) else list(files)
        self.names: list[str] = []
        hidden: list[str] = []
        for part, names in (found for each in several for found in _found(str(each), ending)):
            is_named = names == [part]
            hidden += [name for name in names if not is_named and is_hidden(_last(name))]
            self.names += [name for name in names if is_named or not is_hidden(_last(name))]
        self.skipped = skipped_line("hidden or system files", hidden)
        if not self.names:
            raise DataError(
                f"files: {files}: no {ending} files there", f"a folder, a file, or a pattern: *{ending}"
            )

    def open(self, name: str) -> Any:
        """Seekable binary file object."""
        if "://" not in name:
            return open(name, "rb")
        import fsspec

        return fsspec.open(name, "rb").open()

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        if "://" not in name:
            return Path(name).stat().st_size
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(name)
        return int(filesystem.size(path))

    def version(self, name: str) -> str | None:
        """Text that changes when the file does; None where its filesystem does not tell."""
        if "://" not in name:
            status = Path(name).stat()
            return f"{Path(name).resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(name)
        told = filesystem.info(path)
        changes = [(key, told[key]) for key in _CHANGES if told.get(key)]
        return f"{name} {told['size']} {changes}" if changes else None

    def described(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Name, size and rows of every file, for a fingerprint; no folders, so that data may be moved."""
        return [
            {"name": _last(name), "bytes": self.size(name), "rows": count}
            for name, count in zip(self.names, rows, strict=True)
        ]


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


class OpenFiles:
    """The latest files of a set, few of them open; a local one that has changed since then is refused."""

    def __init__(self, files: FileSet) -> None:
        self._files = files
        self._stamps = {name: _stamp(os.stat(name)) for name in files.names if "://" not in name}
        self._opened: OrderedDict[str, Any] = OrderedDict()

    def file(self, name: str) -> Any:
        """Seekable binary file object.

        Raises:
            DataError: the file has changed, or cannot be opened any more.
        """
        try:
            if name not in self._opened:
                self._opened[name] = self._files.open(name)
            file = _latest(self._opened, name, _OPEN_FILES)
            if name in self._stamps and _stamp(os.fstat(file.fileno())) != self._stamps[name]:
                raise DataError(f"files: {name}: changed while it was in use", "data that stay as they are")
        except OSError as error:
            raise DataError(f"files: {name}: {error.strerror or error}", "data that stay there") from None
        return file


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """What changes with the contents of a file: its size and time of change."""
    return status.st_size, status.st_mtime_ns


class RangeReader:
    """Random access to byte ranges of files.

    Of local files exactly the range is read; the system caches what is read often. From an address whole
    chunks of 4 MiB are fetched, since every request takes its time, and the latest are kept.

    Args:
        files: the set that the files belong to.
        cache_bytes: the most bytes of chunks that are kept; at least one chunk is.
    """

    def __init__(self, files: FileSet, cache_bytes: int) -> None:
        self._most_chunks = max(1, cache_bytes // _CHUNK_BYTES)
        self._chunks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._opened = OpenFiles(files)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file.

        Raises:
            DataError: they are not there, or the file has changed.
        """
        if "://" not in name:
            data = _read(self._opened.file(name).fileno(), offset, size)
        else:
            chunks = range(offset // _CHUNK_BYTES, (offset + size - 1) // _CHUNK_BYTES + 1)
            begin = offset % _CHUNK_BYTES
            data = b"".join(self._chunk(name, number) for number in chunks)[begin : begin + size]
        if len(data) != size:
            raise DataError(
                f"files: {name}: {len(data)} of {size} bytes from {offset} on", "data that stay as they are"
            )
        return data

    def _chunk(self, name: str, number: int) -> bytes:
        if (name, number) not in self._chunks:
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(name)
            begin = number * _CHUNK_BYTES
            self._chunks[name, number] = filesystem.cat_file(path, begin, begin + _CHUNK_BYTES)
        return _latest(self._chunks, (name, number), self._most_chunks)


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """Bytes of a file; the system gives 2 GiB at once at most."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def _latest(kept: OrderedDict[Any, Any], key: Any, most: int) -> Any:
    """The value of a key, which becomes the latest; the oldest others are dropped."""
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]


def one_path(where: str | Path) -> Path:
    """A path of this machine for what cannot be several: `~` is the home folder, patterns are refused."""
    path = _at_home(str(where))
    if _several(path) and not os.path.lexists(path):
        raise DataError(f"files: {where}: a pattern, where one path is wanted", "write it out")
    return Path(path)


def _found(where: str, ending: str) -> Iterator[tuple[str, list[str]]]:
    """The parts that a path, a folder or a pattern stands for, each with its files, at least one."""
    path = where if "://" in where else _at_home(where)
    is_there = "://" not in path and os.path.lexists(path)  # whatever characters its name has
    for part in [path] if is_there else _alternatives(path):
        names = _matching(part, ending)
        if not names:
            of = "" if part == where else f" (of {where})"
            is_one = (is_there or not _several(part)) and "://" not in part and not os.path.isdir(part)
            wrong = "no such file" if is_one else f"no {ending} files there"
            raise DataError(f"files: {part}{of}: {wrong}", f"a folder, a file, or a pattern: *{ending}")
        yield part, names


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
    is_deep = "**" in path  # which then keeps out of hidden folders; others name what they leave out
    found = glob.glob(path, recursive=True, include_hidden=not is_deep)
    return sorted(name for name in found if os.path.isfile(name))


def _several(path: str) -> bool:
    return glob.has_magic(path) or _BRACES.search(path) is not None


def _at_home(path: str) -> str:
    """A path with its `~` replaced, on this machine."""
    whole = os.path.expanduser(path)
    if whole.startswith("~") and not os.path.lexists(whole):
        raise DataError(
            f"files: {path}: no user {whole.partition('/')[0]} is known here", "write the path out"
        )
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
            raise DataError(f"files: {path}: stands for more than {_MOST_FILES} files", "name fewer")
    return whole


def _counted(path: str, first: str, last: str) -> list[str]:
    """The numbers from first to last, as wide as they are written."""
    if int(last) - int(first) not in range(_MOST_FILES):
        wrong = f"{{{first}..{last}}} counts no files, or more than {_MOST_FILES}"
        raise DataError(f"files: {path}: {wrong}", "{000..127} counts upwards")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]

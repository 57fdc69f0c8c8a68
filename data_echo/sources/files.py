"""Sets of files, local or at any fsspec address."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_echo.errors import DataError
from data_echo.sources.skipped import is_hidden, skipped_line

_OPEN_FILES = 128  # the most that a source keeps open
_CHUNK_BYTES = 4 * 2**20  # fetched by one request
_CHANGES = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")


class FileSet:
    """Files in alphabetical order, or in the order in which they are given.

    Args:
        files: a folder, a pattern with `*`, a file, or several files; local paths or fsspec addresses
            (`s3://bucket/folder`).
        ending: the ending of the files that are taken from a folder.

    Attributes:
        names: of the files; of a folder or a pattern never hidden ones or a system's.
        skipped: a line on those, if any.

    Raises:
        DataError: a file is missing, or there is none.
    """

    def __init__(self, files: str | Path | Sequence[str | Path], ending: str) -> None:
        if isinstance(files, str | Path):
            found = _found(str(files), ending)
            is_listed = found == [str(files)]
        else:
            found, is_listed = [str(file) for file in files], True
        self.names = [name for name in found if is_listed or not is_hidden(_last(name))]
        hidden = [name for name in found if not is_listed and is_hidden(_last(name))]
        self.skipped = skipped_line("hidden or system files", hidden)
        missing = [name for name in self.names if "://" not in name and not Path(name).is_file()]
        if missing:
            raise DataError(f"files: {missing[0]}: no such file", f"the path of a {ending} file")
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


def _found(where: str, ending: str) -> list[str]:
    if "://" in where:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(where)
        pattern = path if "*" in path or path.endswith(ending) else f"{path.rstrip('/')}/*{ending}"
        return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern))
    if "*" in where:
        return sorted(str(path) for path in Path(where).parent.glob(Path(where).name))
    if Path(where).is_dir():
        return sorted(str(path) for path in Path(where).glob(f"*{ending}"))
    return [where]

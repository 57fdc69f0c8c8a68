"""Sets of files, local or at any fsspec address."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_echo.errors import DataError

_OPEN_FILES = 128  # at once, of one source
_PIECE_BYTES = 4 * 2**20  # fetched by one request
_CHANGES = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")


class FileSet:
    """Files in the order of their names.

    Args:
        files: a folder, a pattern with `*`, a file, or several files; local paths or fsspec addresses
            (`s3://bucket/folder`).
        ending: of the files that count in a folder.

    Raises:
        DataError: nothing is there.
    """

    def __init__(self, files: str | Path | Sequence[str | Path], ending: str) -> None:
        self.names = (
            _found(str(files), ending) if isinstance(files, str | Path) else [str(file) for file in files]
        )
        missing = [name for name in self.names if "://" not in name and not Path(name).is_file()]
        if missing:
            raise DataError(f"files: {missing[0]}: no such file; the path of a {ending} file")
        if not self.names:
            raise DataError(
                f"files: {files}: no {ending} files there; a folder, a file, or a pattern: *{ending}"
            )

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

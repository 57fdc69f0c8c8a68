"""Sets of files, local or at any fsspec address."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_echo.errors import DataError


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

    def described(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Name, size and rows of every file, for a fingerprint; without folders, so that data may move."""
        return [
            {"name": name.rsplit("/", 1)[-1], "bytes": self.size(name), "rows": count}
            for name, count in zip(self.names, rows, strict=True)
        ]


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

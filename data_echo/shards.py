"""Tar shards in the WebDataset layout: files of one example lie together and share a name up to its first
dot.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_echo.errors import DataError
from data_echo.files import FileSet

_Place = tuple[int, int]  # offset and bytes within the shard


class TarSource:
    """Examples of tar shards, by number; each shard's headers are read once, at the start.

    An example is {"__key__": name, ending: bytes, ...}, for example {"__key__": "000017", "jpg": ..., "cls":
    ...}.

    Args:
        files: a folder, a pattern (`data/train-*.tar`), a file, or several; local paths or fsspec addresses.
            Not compressed: random access needs plain tar.

    Raises:
        DataError: there is no such file, or it is no plain tar.
    """

    def __init__(self, files: str | Path | Sequence[str | Path]) -> None:
        self._shards = FileSet(files, ".tar")
        self._opened: dict[int, Any] = {}
        self._examples: list[tuple[int, str, dict[str, _Place]]] = []
        self._counts = []
        for shard, name in enumerate(self._shards.names):
            before = len(self._examples)
            self._index(shard, name)
            self._counts.append(len(self._examples) - before)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, key, places = self._examples[index]
        file = self._file(shard)
        example: dict[str, Any] = {"__key__": key}
        for ending, (offset, size) in places.items():
            file.seek(offset)
            example[ending] = file.read(size)
        return example

    def origin(self, index: int) -> str:
        """`shard:key`."""
        shard, key, _ = self._examples[index]
        return f"{self._shards.names[shard]}:{key}"

    def fingerprint(self) -> dict[str, Any]:
        """Shards with sizes and examples, and a hash of the index."""
        digest = hashlib.sha256(repr(self._examples).encode())
        shards = self._shards.described(self._counts)
        return {"files": shards, "rows": len(self), "hash": digest.hexdigest()}

    def _index(self, shard: int, name: str) -> None:
        places: dict[str, dict[str, _Place]] = {}
        try:
            with self._shards.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isfile():
                        folder, _, base = member.name.rpartition("/")
                        stem, _, ending = base.partition(".")
                        key = f"{folder}/{stem}" if folder else stem
                        places.setdefault(key, {})[ending] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise DataError(f"shards: {name}: {error}; a whole, uncompressed tar file") from None
        self._examples += [(shard, key, found) for key, found in places.items()]

    def _file(self, shard: int) -> Any:
        if shard not in self._opened:
            self._opened[shard] = self._shards.open(self._shards.names[shard])
        return self._opened[shard]

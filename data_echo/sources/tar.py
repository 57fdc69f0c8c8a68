"""Tar shards in the WebDataset layout: the files of an example are adjacent and share a name up to its first
dot.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_echo.errors import DataError
from data_echo.sources.files import FileSet, RangeReader
from data_echo.sources.skipped import skipped_line
from data_echo.sources.tar_index import ShardIndex, indexed


class TarSource:
    """Examples of tar shards, by number. The headers of a shard are read once on a machine (see `indexed`).

    An example is {"__key__": name, ending: bytes, ...}, for example {"__key__": "000017", "jpg": ..., "cls":
    ...}. Names are told apart by case and folder. A hard link is the file that it links to; symbolic links,
    sparse files and devices are refused, and hidden or system members are left out.

    Args:
        files: a folder, a pattern (`data/train-*.tar`), a file, or several; local paths or fsspec addresses.
            Not compressed: random access needs plain tar.
        cache_bytes: the most bytes fetched from an address that are kept in memory. For shards much larger
            than that, shuffle blocks of rows (`batch.shuffle` in a recipe).

    Attributes:
        skipped: lines on the files and members that were left out, if any.

    Raises:
        DataError: there is no such file, it is not a whole, plain tar, a member is refused, or there are no
            examples.
    """

    def __init__(self, files: str | Path | Sequence[str | Path], *, cache_bytes: int = 2**30) -> None:
        self._shards = FileSet(files, ".tar")
        self._indices = [indexed(self._shards, name) for name in self._shards.names]
        self._ends = np.cumsum([len(index) for index in self._indices])
        if not len(self):
            raise DataError(f"shards: {files}: no examples in {len(self._indices)} files", "at least one")
        hidden = (os.fsdecode(bytes(name)) for index in self._indices for name in index.skipped)
        self.skipped = self._shards.skipped + skipped_line("hidden or system members", hidden)
        self._cache_bytes = cache_bytes
        self._reader = RangeReader(self._shards, cache_bytes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, shard, row = self._place(index)
        example: dict[str, Any] = {"__key__": shard.key(row)}
        for ending, offset, size in shard.files(row):
            example[ending] = self._reader.read(name, offset, size)
        return example

    def origin(self, index: int) -> str:
        """`shard:key` of an example."""
        name, shard, row = self._place(index)
        return f"{name}:{shard.key(row)}"

    def rows_together(self) -> int:
        """Examples of the largest shard if shards at an address do not fit into the cache; else 1."""
        remote = [name for name in self._shards.names if "://" in name]
        fits = sum(map(self._shards.size, remote)) <= self._cache_bytes
        return 1 if fits else max(map(len, self._indices))

    def fingerprint(self) -> dict[str, Any]:
        """Shards with sizes and examples, and a hash of the index."""
        digest = hashlib.sha256(b"".join(index.digest() for index in self._indices))
        shards = self._shards.described([len(index) for index in self._indices])
        return {"files": shards, "rows": len(self), "hash": digest.hexdigest()}

    def _place(self, index: int) -> tuple[str, ShardIndex, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"shards: example {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        found = self._indices[shard]
        return self._shards.names[shard], found, index - int(self._ends[shard]) + len(found)

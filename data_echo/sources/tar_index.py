"""The index of a tar shard: where its examples are, from its headers, which are read once on a machine."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from data_echo.errors import DataError
from data_echo.sources.files import FileSet


@dataclass(frozen=True)
class ShardIndex:
    """The examples of one shard, in the order of their first files.

    Attributes:
        keys: bytes [examples]: the name that an example's files share.
        starts: int64 [examples + 1]: the first file of each example, then the number of files.
        endings: bytes [files].
        places: int64 [files, 2]: offset and bytes within the shard.
    """

    keys: np.ndarray
    starts: NDArray[np.int64]
    endings: np.ndarray
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        """The name that the files of an example share."""
        return os.fsdecode(bytes(self.keys[row]))

    def files(self, row: int) -> list[tuple[str, int, int]]:
        """Files of an example: ending, offset, bytes."""
        these = slice(self.starts[row], self.starts[row + 1])
        names = [os.fsdecode(bytes(ending)) for ending in self.endings[these]]
        return [(name, *place) for name, place in zip(names, self.places[these].tolist(), strict=True)]

    def digest(self) -> bytes:
        """SHA-256 of the index."""
        digest = hashlib.sha256()
        for array in astuple(self):
            digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        return digest.digest()


def indexed(files: FileSet, name: str) -> ShardIndex:
    """The index of a shard, from this machine's cache where possible.

    The cache is `$XDG_CACHE_HOME/lockstep/shards`, by default `~/.cache/lockstep/shards`. Its keys are made
    of the shard's name, size and time of change, so the index of a changed shard is not used. Where the
    folder cannot be written the headers are read each time.

    Raises:
        DataError: the file is not a plain tar.
    """
    version = files.version(name)
    if version is None:
        return _read(files, name)
    kept = _folder() / f"{hashlib.sha256(version.encode()).hexdigest()}.npz"
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            return ShardIndex(*(arrays[field.name] for field in fields(ShardIndex)))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        index = _read(files, name)
    _keep(index, kept)
    return index


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep" / "shards"


def _keep(index: ShardIndex, path: Path) -> None:
    """Write an index atomically, since other processes may read or write the same; ignore failures."""
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder) / "index.npz"
            np.savez(draft, **{field.name: getattr(index, field.name) for field in fields(index)})
            draft.replace(path)


def _read(files: FileSet, name: str) -> ShardIndex:
    examples: dict[str, list[tuple[str, int, int]]] = {}
    try:
        with files.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    found = examples.setdefault(f"{folder}/{stem}" if folder else stem, [])
                    found.append((ending, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise DataError(f"shards: {name}: {error}", "a whole, uncompressed tar file") from None
    rows = [row for found in examples.values() for row in found]
    return ShardIndex(
        np.array([os.fsencode(key) for key in examples], np.bytes_),
        np.cumsum([0, *map(len, examples.values())]),
        np.array([os.fsencode(ending) for ending, _, _ in rows], np.bytes_),
        np.array([place for _, *place in rows], np.int64).reshape(-1, 2),
    )

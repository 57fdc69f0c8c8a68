"""The index of a tar shard: where its examples are, from its headers, which are read once on a machine."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from data_echo.errors import DataError
from data_echo.sources.files import FileSet
from data_echo.sources.skipped import is_hidden

_LAYOUT = 2  # of the kept indices; raised with every change of what they hold
_BLOCK = 512  # bytes of a tar's headers
_AT_ONCE = 2**20  # bytes
_PLAIN = "plain files (tar --dereference --hard-dereference)"


@dataclass(frozen=True)
class ShardIndex:
    """The examples of one shard, in the order of their first files.

    Attributes:
        keys: bytes [examples]: the name that an example's files share.
        starts: int64 [examples + 1]: the first file of each example, then the number of files.
        endings: bytes [files].
        places: int64 [files, 2]: offset and bytes within the shard.
        skipped: bytes [n]: names of members that are hidden or a system's.
    """

    keys: np.ndarray
    starts: NDArray[np.int64]
    endings: np.ndarray
    places: NDArray[np.int64]
    skipped: np.ndarray

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
        """SHA-256 of the examples."""
        digest = hashlib.sha256()
        for array in (self.keys, self.starts, self.endings, self.places):
            digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        return digest.digest()


def indexed(files: FileSet, name: str) -> ShardIndex:
    """The index of a shard, from this machine's cache where possible.

    The cache is `$XDG_CACHE_HOME/lockstep/shards`, by default `~/.cache/lockstep/shards`. Its keys are made
    of the shard's name, size and times of change, so the index of a changed shard is not used. Where the
    folder cannot be written the headers are read each time.

    Raises:
        DataError: the file is not a plain tar.
    """
    version = files.version(name)
    if version is None:
        return _read(files, name)
    kept = _folder() / f"{hashlib.sha256(f'{_LAYOUT} {version}'.encode()).hexdigest()}.npz"
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
    members = _Members(name)
    try:
        with files.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                members.add(member)
            _check_end(file, tar.offset, name)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"shards: {name}: {error}", "a whole, uncompressed tar file") from None
    return members.index()


def _check_end(file: Any, offset: int, name: str) -> None:
    """Refuse a shard that does not end where its members do: tarfile is silent where a header is damaged."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise DataError(f"shards: {name}: ends at byte {offset} without the mark of its end", "a whole file")
    if any(block):
        raise DataError(f"shards: {name}: no header at byte {offset}", "a whole file")
    while data := file.read(_AT_ONCE):
        if data.count(0) < len(data):
            raise DataError(
                f"shards: {name}: goes on after its end at byte {offset}",
                "one archive in a file (tar --concatenate joins several)",
            )


class _Members:
    """The members of a shard, as they are read from it."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._examples: dict[str, tuple[str, list[tuple[str, int, int]]]] = {}
        self._latest = ""
        self._places: dict[str, tuple[int, int]] = {}
        self._skipped: list[str] = []

    def add(self, member: tarfile.TarInfo) -> None:
        """Take the next member.

        Raises:
            DataError: it is no file, or its name or its place does not allow to say which example it is of.
        """
        path = posixpath.normpath(member.name)
        if is_hidden(path):
            self._skipped.append(member.name)
        elif not member.isdir():
            place = self._place(member)
            if path in self._places:
                raise self._refused(member, "stands there twice", "each name once")
            self._places[path] = place
            self._add(member, path, place)

    def index(self) -> ShardIndex:
        """The index of all of them."""
        examples = self._examples.values()
        rows = [row for _, found in examples for row in found]
        return ShardIndex(
            np.array([os.fsencode(key) for key, _ in examples], np.bytes_),
            np.cumsum([0, *(len(found) for _, found in examples)]),
            np.array([os.fsencode(ending) for ending, _, _ in rows], np.bytes_),
            np.array([place for _, *place in rows], np.int64).reshape(-1, 2),
            np.array([os.fsencode(name) for name in self._skipped], np.bytes_),
        )

    def _add(self, member: tarfile.TarInfo, path: str, place: tuple[int, int]) -> None:
        group, ending = _split(path)
        if group != self._latest and group in self._examples:
            raise self._refused(
                member, f"is apart from the other files of {group!r}", "the files of an example side by side"
            )
        if ending == "__key__":
            raise self._refused(member, "ends like the key of an example", "another ending")
        self._latest = group
        self._examples.setdefault(group, (_split(member.name)[0], []))[1].append((ending, *place))

    def _place(self, member: tarfile.TarInfo) -> tuple[int, int]:
        """Offset and bytes of a member's data; those of a hard link are the ones of the file it links to."""
        if member.islnk():
            target = posixpath.normpath(member.linkname)
            if target in self._places:
                return self._places[target]
            raise self._refused(member, f"links to {member.linkname}, which is not before it", _PLAIN)
        if member.issym():
            raise self._refused(member, f"is a symbolic link to {member.linkname}", _PLAIN)
        if member.issparse():
            raise self._refused(member, "is stored as a sparse file", "plain files (tar without --sparse)")
        if not member.isreg():
            raise self._refused(member, f"is no file (type {member.type!r})", "files and folders")
        return member.offset_data, member.size

    def _refused(self, member: tarfile.TarInfo, wrong: str, right: str) -> DataError:
        return DataError(f"shards: {self._shard}: {member.name} {wrong}", right)


def _split(path: str) -> tuple[str, str]:
    """The key of the example that a file belongs to, and the file's ending."""
    folder, _, base = path.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending

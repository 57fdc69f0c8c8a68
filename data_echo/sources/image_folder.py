"""Folders of encoded images, one subfolder for each class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_echo.errors import DataError
from data_echo.sources.skipped import is_hidden, skipped_line

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_TRAINING = (
    "train",
    "training",
    "Train",
    "Training",
)  # names of the folder whose classes those beside it have
_SHOWN = 10  # classes in a message


class ImageFolderSource:
    """Images of `folder/class/.../name.jpg`, in the order of their paths.

    An example is {"image": bytes, "label": int64}; labels number the classes. Hidden and system names,
    other files, and folders without images are no data. Links to files and folders are followed wherever
    they lead; broken ones and circles are refused.

    Args:
        folder: has a subfolder for each class.
        classes: their names in the order of the labels, the same for all splits. None: the subfolders with
            images, in alphabetical order, of the training split, which is the folder `train` or `training`
            beside this one; without such a neighbour, this folder.

    Attributes:
        classes: the names of the classes, in the order of their labels.
        skipped: lines on what was left out, if anything.

    Raises:
        DataError: there is no such folder, no image in it, or an image of a class that is not in the list.
    """

    def __init__(self, folder: str | Path, classes: Sequence[str] | None = None) -> None:
        self._folder = Path(folder).expanduser()
        if not self._folder.is_dir():
            raise DataError(
                f"images: {folder}: no such folder", "one, not a pattern, with a subfolder for each class"
            )
        ignored = _Ignored()
        found = _by_class(self._folder, ignored)
        self.classes = _listed(classes) if classes is not None else _training_classes(self._folder, found)
        self._files: list[Path] = []
        self._labels: list[int] = []
        for name in sorted(found):
            if name not in self.classes:
                known = ", ".join(self.classes[:_SHOWN]) + (", ..." if len(self.classes) > _SHOWN else "")
                raise DataError(
                    f"images: {self._folder / name}: {name!r} is none of the {len(self.classes)} classes",
                    f"{known} (of the training split, or `classes=[...]`)",
                )
        for label, name in enumerate(self.classes):
            self._files += found.get(name, [])
            self._labels += [label] * len(found.get(name, []))
        if not self._files:
            endings = ", ".join(sorted(ENDINGS))
            raise DataError(f"images: {folder}: no images in subfolders", f"class/name with one of {endings}")
        self.skipped = ignored.lines()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._files[index].read_bytes(), "label": np.int64(self._labels[index])}

    def origin(self, index: int) -> str:
        """Path of an image."""
        return str(self._files[index])

    def fingerprint(self) -> dict[str, Any]:
        """Rows, bytes, classes, and a hash of the files' names and sizes."""
        digest, total = hashlib.sha256(), 0
        for file in self._files:
            size = file.stat().st_size
            total += size
            digest.update(os.fsencode(f"{file.relative_to(self._folder)} {size}\n"))
        rows = len(self._files)
        return {"rows": rows, "bytes": total, "classes": list(self.classes), "hash": digest.hexdigest()}


@dataclass
class _Ignored:
    """Names of what is no data, by the reason."""

    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    def lines(self) -> tuple[str, ...]:
        """A line for each reason, if anything was left out for it."""
        return (
            skipped_line("hidden or system names", self.hidden)
            + skipped_line("files that are no images of a class", self.others)
            + skipped_line("folders without images", self.empty)
        )


def _listed(classes: Sequence[str]) -> tuple[str, ...]:
    """The classes that a user gives."""
    if isinstance(classes, str) or len(set(classes)) != len(classes):
        raise DataError(f"images: classes: {classes}", "a list of names, each once")
    return tuple(classes)


def _training_classes(folder: Path, found: dict[str, list[Path]]) -> tuple[str, ...]:
    """The classes of the training split beside a folder; without one, those that were found in the folder."""
    own = Path(os.path.abspath(folder))
    for name in _TRAINING:
        split = own.parent / name
        if own.name in _TRAINING or not split.is_dir():
            continue
        subfolders = [path for path in split.iterdir() if path.is_dir() and not is_hidden(path.name)]
        return tuple(sorted(path.name for path in subfolders if any(_images(path, _Ignored()))))
    return tuple(sorted(found))


def _by_class(folder: Path, ignored: _Ignored) -> dict[str, list[Path]]:
    """The images of each subfolder that has some, in the order of their paths."""
    found = {}
    for path in folder.iterdir():
        if is_hidden(path.name):
            ignored.hidden.append(path.name)
        elif not path.is_dir():
            ignored.others.append(path.name)
        elif images := sorted(_images(path, ignored)):
            found[path.name] = images
        else:
            ignored.empty.append(path.name)
    return found


def _images(folder: Path, ignored: _Ignored, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Images in a folder and below it.

    Raises:
        DataError: a folder cannot be read or lies within itself, or an image is a broken link.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"images: {folder}: a link that leads back to {real}", "folders without circles")
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"images: {folder}: {error.strerror}", "a folder that can be read") from None
    for entry in entries:
        path = folder / entry.name
        if is_hidden(entry.name):
            ignored.hidden.append(f"{folder.name}/{entry.name}")
        elif entry.is_dir():
            yield from _images(path, ignored, above | {real})
        elif path.suffix.lower() not in ENDINGS:
            ignored.others.append(f"{folder.name}/{entry.name}")
        elif entry.is_file():
            yield path
        elif entry.is_symlink():
            raise DataError(f"images: {path}: a link to nothing", "an image, or no link")
        else:
            ignored.others.append(f"{folder.name}/{entry.name}")  # a pipe, a socket or a device

"""Folders of encoded images, one subfolder for each class."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from data_echo.errors import DataError

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


class ImageFolderSource:
    """Images of `folder/class/.../name.jpg`, in the order of their paths.

    An example is {"image": bytes, "label": int64}; labels number the classes in alphabetical order.

    Args:
        folder: has a subfolder for each class.

    Attributes:
        classes: the names of the classes, in the order of their labels.

    Raises:
        DataError: there is no such folder, or no image in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise DataError(f"images: {folder}: no such folder", "one with a subfolder for each class")
        self.classes = tuple(sorted(path.name for path in self._folder.iterdir() if path.is_dir()))
        self._files: list[Path] = []
        self._labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = (path for path in (self._folder / name).rglob("*") if path.suffix.lower() in ENDINGS)
            files = sorted(found)
            self._files += files
            self._labels += [label] * len(files)
        if not self._files:
            endings = ", ".join(sorted(ENDINGS))
            raise DataError(f"images: {folder}: no images in subfolders", f"class/name with one of {endings}")

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
            digest.update(f"{file.relative_to(self._folder)} {size}\n".encode())
        rows = len(self._files)
        return {"rows": rows, "bytes": total, "classes": list(self.classes), "hash": digest.hexdigest()}

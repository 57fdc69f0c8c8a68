"""Checkpoints: complete, atomic, checksummed, written beside the loop, and loadable on any number of workers.

A checkpoint is a folder `step-00000042` with the state (`state.pt`, tensors and plain values only) and a
manifest naming its size and SHA-256. It is written under another name, flushed to the disk, and renamed when
it is whole: what carries the right name and the right checksum can be trusted, and everything else is passed
over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import Stopped

State = dict[str, Any]
FORMAT = 1


class Checkpoints:
    """The checkpoints of one run, in a folder. One process writes (rank 0); any may read."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, state: State) -> Path:
        """Write `state` (copied now, written in the background). Waits only for a write that is still going
        on.
        """
        self.wait()
        copied = _copy(state)
        target = self.folder / f"step-{step:08d}"
        writing = threading.Thread(target=self._write, args=(target, copied), name="checkpoint")
        writing.start()
        self._writing = writing  # not before: an interrupt in between would leave what cannot be waited for
        return target

    def wait(self) -> None:
        """Until the write in progress is done; raises what went wrong in it."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise Stopped(f"{self.folder}: a checkpoint could not be written: {failure}") from failure

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose every byte is as written, or None. Damaged and half-written ones are
        passed over.
        """
        return next((path for path in self._newest_first() if _is_whole(path)), None)

    def _newest_first(self) -> Iterator[Path]:
        return iter(sorted(self.folder.glob("step-*"), reverse=True))

    def _write(self, target: Path, state: State) -> None:
        try:
            partial = target.with_name(f".writing-{target.name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            torch.save(state, partial / "state.pt")
            manifest = {
                "format": FORMAT,
                "bytes": (partial / "state.pt").stat().st_size,
                "sha256": _sha256(partial),
            }
            (partial / "manifest.json").write_text(json.dumps(manifest))
            for path in (partial / "state.pt", partial / "manifest.json", partial):
                _flush(path)
            shutil.rmtree(target, ignore_errors=True)  # left by a run that went back behind this step
            partial.rename(target)
            _flush(self.folder)
            for old in list(self._newest_first())[self.keep :]:
                shutil.rmtree(old)
        except BaseException as error:
            self._failure = error


def load(path: Path, device: torch.device | str = "cpu") -> State:
    """The state in a checkpoint folder. Nothing but tensors and plain values is unpickled.

    Raises Stopped when the checkpoint is not whole or of another format."""
    if not _is_whole(path):
        raise Stopped(
            f"{path}: the checkpoint is damaged or incomplete; choose an older one of the same folder"
        )
    return torch.load(path / "state.pt", map_location=device, weights_only=True)


def _is_whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return manifest["format"] == FORMAT and manifest["sha256"] == _sha256(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(folder: Path) -> str:
    with (folder / "state.pt").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(value: Any) -> Any:
    """A deep copy with every tensor cloned on the CPU, so that the loop may go on changing the originals."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value

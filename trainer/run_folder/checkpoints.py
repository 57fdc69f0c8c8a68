"""Checkpoints: complete, atomic, checksummed, written in the background, for any number of workers.

A checkpoint is a folder `step-00000042` with the state (`state.pt`, tensors and plain values only) and a
manifest naming its size, its SHA-256, and what is known of it. It is written under another name, flushed to
the disk, and renamed when it is whole: what carries the right name and the right checksum can be trusted, and
everything else is passed over.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import RunFailed
from trainer.recipe.checkpoint import Best
from trainer.run_folder.durable import make_durable
from trainer.run_folder.layout import ANY_CHECKPOINT, MANIFEST, STATE, WRITING, checkpoint_name

State = dict[str, Any]
FORMAT = 1


class Checkpoints:
    """The checkpoints of one run, in a folder: the newest `keep`, and the `best` ones.

    One process writes (rank 0); any may read.
    """

    def __init__(self, folder: Path, keep: int, best: Best | None = None):
        self.folder, self.keep, self.best = folder, keep, best
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, state: State, **known: Any) -> Path:
        """Write `state` (copied now, written in the background), its manifest with all that is `known` of it:
        `metrics` of the validation split, by name, count in what is best. Waits only for a write that is
        still going on.
        """
        self.wait()
        copied = _copy(state)
        target = self.folder / checkpoint_name(step)
        writing = threading.Thread(target=self._write, args=(target, copied, known), name="checkpoint")
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
            raise RunFailed(f"{self.folder}: a checkpoint could not be written: {failure}") from failure

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose every byte is as written, or None. Damaged and half-written ones are
        passed over.
        """
        return next((path for path in self._newest_first() if is_whole(path)), None)

    def newest_name(self) -> str | None:
        """The name of the newest checkpoint, whole or not."""
        return next((path.name for path in self._newest_first()), None)

    def is_among_best(self, metrics: dict[str, float]) -> bool:
        """Whether a checkpoint with these metrics of the validation split would be kept for them."""
        if self.best is None:
            return False
        if self.best.metric not in metrics:
            raise RunFailed(
                f"checkpoint.best: the task has no metric {self.best.metric}; it has {', '.join(metrics)}"
            )
        merit, rivals = self._merit(metrics), [merit for merit, _ in self._best_first()]
        return merit > -math.inf and (len(rivals) < self.best.keep or merit > rivals[self.best.keep - 1])

    def _best_first(self) -> list[tuple[float, Path]]:
        """Those with the metric that counts, each with its merit: the larger, the better."""
        merits = [(self._merit(_metrics(path)), path) for path in self._newest_first()]
        return sorted((merit for merit in merits if merit[0] > -math.inf), reverse=True)

    def _merit(self, metrics: dict[str, float]) -> float:
        value = metrics.get(self.best.metric, math.nan) if self.best else math.nan
        if not math.isfinite(value):
            return -math.inf
        return value if self.best and self.best.mode == "max" else -value

    def _prune(self) -> None:
        kept = list(self._newest_first())[: self.keep]
        if self.best is not None:
            kept += [path for _, path in self._best_first()[: self.best.keep]]
        for path in set(self._newest_first()) - set(kept):
            shutil.rmtree(path, ignore_errors=True)

    def _newest_first(self) -> Iterator[Path]:
        """Folders only: files and links that lie here are somebody else's, and are left alone."""
        found = (path for path in self.folder.glob(ANY_CHECKPOINT) if path.is_dir() and not path.is_symlink())
        return iter(sorted(found, reverse=True))

    def _write(self, target: Path, state: State, known: dict[str, Any]) -> None:
        try:
            partial = target.with_name(f"{WRITING}{target.name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _save(state, partial / STATE)
            told = {"format": FORMAT, "bytes": (partial / STATE).stat().st_size, "sha256": _sha256(partial)}
            (partial / MANIFEST).write_text(json.dumps(told | known))
            for path in (partial / STATE, partial / MANIFEST, partial):
                make_durable(path)
            shutil.rmtree(target, ignore_errors=True)  # left by a run that went back behind this step
            partial.rename(target)
            make_durable(self.folder)
            self._prune()
        except BaseException as error:
            self._failure = error


def _save(state: State, path: Path) -> None:
    """As torch.save, without a checksum of its own: that of the manifest holds for the file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(before)


def _metrics(path: Path) -> dict[str, float]:
    """The metrics in a checkpoint's manifest, where they are numbers."""
    told = manifest(path).get("metrics", {})
    pairs = told.items() if isinstance(told, dict) else ()
    return {name: value for name, value in pairs if isinstance(value, int | float)}


def manifest(path: Path) -> dict[str, Any]:
    """What is known of a checkpoint; nothing where its manifest cannot be read."""
    try:
        told = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written."""
    told = manifest(path)
    try:
        return told.get("format") == FORMAT and told.get("sha256") == _sha256(path)
    except OSError:
        return False


def load(path: Path, device: torch.device | str = "cpu") -> State:
    """The state in a checkpoint folder. Nothing but tensors and plain values is unpickled.

    Raises RunFailed when the checkpoint is not whole or of another format."""
    if not is_whole(path):
        raise RunFailed(
            f"{path}: the checkpoint is damaged or incomplete; choose an older one of the same folder"
        )
    return read(path, device)


def read(path: Path, device: torch.device | str = "cpu") -> State:
    """As `load`, of a checkpoint that is known to be whole."""
    return torch.load(path / STATE, map_location=device, weights_only=True)


def _sha256(folder: Path) -> str:
    with (folder / STATE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(value: Any) -> Any:
    """A deep copy with every tensor cloned on the CPU, so that the loop may go on changing the originals."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value

"""The journal of a run: one JSON object per line in `journal.jsonl`, append-only.

Rank 0 writes it; who wants to see the run (the screen, the MLflow writer, a resumed run) follows the
file. So training never waits for an onlooker, and an onlooker that was away misses nothing.

Every line has `kind` and `time` (Unix seconds) and the fields of its kind (docs/tracking.md lists them).
JSON knows no NaN and no infinity: they stand in the file as the strings "NaN", "Infinity" and "-Infinity",
which any JSON reader copes with, and `read` and `follow` give them back as floats.
"""

import atexit
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from trainer.recipe.redaction import hidden_in
from trainer.run_folder import layout
from trainer.run_folder.durable import make_durable, naming
from trainer.run_folder.journal_lines import completed, wrong_with

FLUSH_INTERVAL_S = 0.2
PLANNED = "recipe and plan"  # the stage with which a command begins a run or resumes it
POLL_INTERVAL_S = 0.05
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Line = dict[str, Any]
logger = logging.getLogger("lockstep.journal")


class Journal:
    """Appends lines to the journal of the run that lives in `folder`, which must exist.

    Steps come in hundreds a second and are gathered for up to 0.2 s; any other kind is on its way to a
    reader when `write` returns. Several processes may append at once: whole lines go out in one append.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = path = Path(folder) / layout.JOURNAL
        is_new = not path.exists()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the journal)
        self._pending: list[bytes] = [] if _ends_whole(path) else [b"\n"]
        self._flushed_at = time.monotonic()
        if is_new:
            make_durable(path.parent)  # or a power cut may take the new file away
        atexit.register(self.close)

    def write(self, kind: str, /, **fields: Any) -> None:
        """Append one line. Numbers of numpy and torch are written as the Python numbers that they hold, and
        secrets are hidden.
        """
        if kind != "step":  # which holds numbers only
            fields = hidden_in(fields)
        self._pending.append(_encode({"kind": kind, "time": round(time.time(), 3), **fields}))
        if kind != "step" or time.monotonic() - self._flushed_at >= FLUSH_INTERVAL_S:
            self.flush()

    def decide(self, position: int, what: str, value: Any) -> None:
        """Append a decision that the run took from a measurement; it is on the disk when this returns."""
        self.write("decision", position=position, what=what, value=value)
        os.fsync(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes in the file now: the offset at which what is still to be written begins."""
        return os.fstat(self._file.fileno()).st_size

    def flush(self) -> None:
        """Hand all that was written to the operating system."""
        rest = memoryview(b"".join(self._pending))
        with naming(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._pending.clear()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush and close; closing twice does nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()
            atexit.unregister(self.close)


def append(folder: str | Path, kind: str, /, **fields: Any) -> None:
    """Write one line to the journal in a folder, and close it."""
    with closing(Journal(folder)) as journal:
        journal.write(kind, **fields)


class Tail:
    """Reads the whole lines that a journal has gained since the last call. `offset` counts bytes."""

    def __init__(self, folder: str | Path, offset: int = 0) -> None:
        self.path = Path(folder) / layout.JOURNAL
        self.offset = offset

    @property
    def size(self) -> int:
        """Bytes in the file; 0 when there is none yet."""
        return self.path.stat().st_size if self.path.exists() else 0

    def lines(self) -> list[Line]:
        """The new lines; none when there is no file yet. A line without its end is left for a later call."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [line for line in map(_decode, whole.splitlines()) if line is not None]


def read(folder: str | Path) -> Iterator[Line]:
    """The lines of the journal as it is now, oldest first; none when the run has not written any."""
    yield from Tail(folder).lines()


def last(folder: str | Path) -> Line | None:
    """The last line of a run's journal."""
    newest = deque(read(folder), maxlen=1)
    return newest.pop() if newest else None


def follow(folder: str | Path, stop: Callable[[], bool], offset: int = 0) -> Iterator[Line]:
    """The lines of the journal from byte `offset` on, as they come; ends after `stop()` turned true.

    What was in the file when `stop()` turned true is still yielded.
    """
    tail = Tail(folder, offset)
    while True:
        is_last = stop()
        yield from tail.lines()
        if is_last:
            return
        time.sleep(POLL_INTERVAL_S)


def _encode(line: Line) -> bytes:
    try:
        text = json.dumps(line, allow_nan=False, separators=(",", ":"), default=_plain)
    except ValueError:  # a number that is not finite: rare, so only then is the line walked
        text = json.dumps(_finite(line), allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    """What a number or array of numpy or torch, or a path, is in JSON."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(
        f"journal: {value!r} of type {type(value).__name__} cannot be written; numbers, texts, lists can"
    )


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else json.dumps(value)
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case None | bool() | int() | str():
            return value
    return _finite(_plain(value))


def _decode(data: bytes) -> Line | None:
    """The line, or None for what a writer that was killed left of one: no part of a JSON object is one."""
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if b'NaN"' in data or b'Infinity"' in data:
        line = _not_finite(line)
    if (wrong := wrong_with(line)) is not None:
        logger.warning("a line of the journal %s, and is left out", wrong)
        return None
    return completed(line)


def _not_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _not_finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_not_finite(inner) for inner in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _ends_whole(path: Path) -> bool:
    """Whether the file's last line has its end: a writer that was killed may have left half a line."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

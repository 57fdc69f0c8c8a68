"""How far a worker has come and where its code is, for those who ask from another thread."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

STEPS_REMEMBERED = 20
_COLLECTIVES = ("torch.distributed", "trainer.distributed")  # whose innermost frames wait for other workers
_POOL = "data_echo.prepare"
_LOOP = "trainer.loop"
_COMPILERS = {"torch._dynamo.convert_frame", "torch._inductor.compile_fx"}  # at work, not their code in use
_NOT_OURS = ("<", sys.prefix, sys.base_prefix)  # how the files of libraries begin


@dataclass(frozen=True)
class Report:
    """What a worker does now. `moves` counts what it has done since it began: steps and whatever is between.

    Attributes:
        step: the last one that is done.
        longest_step_s: of the last steps; None before the first is done.
        in_step: whether it is within a step, not between two, and not compiling for one.
        waits_for: what it can do nothing about.
        place: the line of the user's code, or of ours, that it is in.
    """

    moves: int
    step: int
    longest_step_s: float | None
    in_step: bool
    waits_for: Literal["the other workers", "the pool's examples"] | None
    place: str


class Pulse:
    """Kept by the thread that makes it, which trains."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.moves, self.step = 0, 0
        self.seconds: deque[float] = deque(maxlen=STEPS_REMEMBERED)

    def moved(self) -> None:
        """Something is done."""
        self.moves += 1

    def stepped(self, step: int, seconds: float) -> None:
        """A step is done."""
        self.step = step
        self.seconds.append(seconds)
        self.moved()

    def report(self) -> Report:
        """What the thread does now. Called from another one."""
        frames = list(_innermost_first(sys._current_frames().get(self.thread)))
        modules = [str(frame.f_globals.get("__name__")) for frame in frames]
        if modules and modules[0].startswith(_COLLECTIVES):
            waits_for: Literal["the other workers", "the pool's examples"] | None = "the other workers"
        else:
            waits_for = "the pool's examples" if any(map(_is_of_pool, modules)) else None
        return Report(
            self.moves,
            self.step,
            max(self.seconds, default=None),
            _LOOP in modules and _COMPILERS.isdisjoint(modules),
            waits_for,
            next((_named(frame) for frame in frames if _is_ours(frame)), "no code of its own"),
        )


def _innermost_first(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_of_pool(module: str) -> bool:
    return module.startswith(_POOL)


def _is_ours(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith(_NOT_OURS)


def _named(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"

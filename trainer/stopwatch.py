"""Where a step's time goes, on CPU and on GPUs, where launching work takes no time and doing it does."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Laps of one step, added up by name. On a GPU they are events in its stream, read after the step's own
    synchronisation.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        self.marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by name."""
        total: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            total[name] = total.get(name, 0.0) + _between(before, after)
        return total

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event):
        after.synchronize()  # type: ignore[union-attr]
        return before.elapsed_time(after) / 1000  # type: ignore[arg-type]
    return after - before  # type: ignore[operator]

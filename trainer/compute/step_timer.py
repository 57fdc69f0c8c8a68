"""Where a step's time goes, on CPU and on GPUs, where launching work takes no time and doing it does."""

from __future__ import annotations

import itertools
import time

import torch


class StepTimer:
    """Laps of a step, added up by name."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.marks_before: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """A step begins."""
        self.marks_before, self.marks = self.marks, [("", self._now())]

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        self.marks.append((name, self._now()))

    def seconds(self, of_compute: dict[str, float]) -> dict[str, float]:
        """Seconds by name. Those in `of_compute` were measured elsewhere within the laps called "compute",
        and are taken out of them. On a GPU they are those of the step before: to read this step's events
        would be to wait for it.
        """
        marks = self.marks_before if self.on_gpu and self.marks_before else self.marks
        total = {"compute": -sum(of_compute.values()), **of_compute}
        for (_, before), (name, after) in itertools.pairwise(marks):
            total[name] = total.get(name, 0.0) + _between(before, after)
        return {name: max(0.0, value) for name, value in total.items()}

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

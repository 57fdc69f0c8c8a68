"""Where the time of a step goes: torch's profiler over some steps, as files in the run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from trainer.run_folder import layout

UNPROFILED_STEPS = 5  # the first ones, in which buffers are made and choices are tried
MOST_OPERATORS = 40


class Timed(Protocol):
    """A step, with what its seconds were spent on."""

    @property
    def seconds(self) -> dict[str, float]: ...


S = TypeVar("S", bound=Timed)


def profiled(steps: Iterator[S], count: int, folder: Path) -> Iterator[S]:
    """The same steps; once `count` of them are profiled, `folder` holds

    `trace.json.gz`, for chrome://tracing or Perfetto; `operators.txt`, the costliest; and `steps.txt`,
    the mean step by what it was spent on.
    """
    yield from islice(steps, UNPROFILED_STEPS)
    seen: list[S] = []
    with torch.profiler.profile() as profiler:  # of what the device has: CPU, and GPU where there is one
        for step in islice(steps, count):
            seen.append(step)
            yield step
    if seen:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / layout.TRACE))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=MOST_OPERATORS)
        (folder / layout.OPERATORS).write_text(table)
        (folder / layout.MEAN_STEP).write_text("\n".join(breakdown(seen)) + "\n")
    yield from steps


def breakdown(steps: Sequence[Timed]) -> list[str]:
    """A table: what the mean of some steps was spent on, in milliseconds and in percent."""
    means = {name: sum(step.seconds[name] for step in steps) / len(steps) for name in steps[0].seconds}
    whole = sum(means.values())
    rows = [f"{name:<14}{1000 * seconds:>10.3f} ms{seconds / whole:>8.1%}" for name, seconds in means.items()]
    return [f"mean of {len(steps)} steps", *rows, f"{'step':<14}{1000 * whole:>10.3f} ms"]

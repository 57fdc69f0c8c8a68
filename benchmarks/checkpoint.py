"""What a checkpoint costs the training loop.

    python benchmarks/checkpoint.py [--pairs 4]

A Transformer of 25 million parameters trains with LAMB (300 MB of weights and state), with a checkpoint
every 12 steps and without any, in turns. What the loop loses per checkpoint is the difference of the times,
all included: the look for numbers that are not finite, the copy, and what the writing beside the loop takes
from it. At one checkpoint a minute, at most 1 % of the time is the aim. Checkpoints are written below the
folder that the command is run in, and removed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trials import Bar, judge, table

from trainer import door, journal, task
from trainer.run import RunOrder, run_worker

WARM_UP_STEPS = 6
A_MINUTE_S = 60.0


@dataclass(frozen=True)
class Timing:
    """One run after its first steps. `blocked_s` are the waits of its checkpoints, until `save` returned."""

    seconds: float
    blocked_s: list[float]
    threads: int
    megabytes: float


def values(steps: int, every: int, model: dict[str, int]) -> dict[str, Any]:
    """The recipe of one run."""
    return {
        "name": "checkpoint",
        "task": {"use": "tasks:LargeModel", "with": model},
        "batch": {"size": 4, "micro": 4, "lanes": 4},
        "optimizer": {"name": "lamb", "lr": 0.001},
        "train": {"steps": steps},
        "eval": {"every": None},
        "checkpoint": {"every": {"steps": every}},
        "run": {"device": "cpu"},
    }


def run(recipe: dict[str, Any]) -> Timing:
    """Train, and read from the journal how long it took from step to step."""
    parsed = door.parse(json.dumps(recipe))
    make_task = partial(task.make, parsed.task.use, parsed.task.with_)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=Path.cwd()) as folder:
        outcome = run_worker(RunOrder(parsed, folder, make_task))
        if outcome.status != "FINISHED":
            raise SystemExit(f"the run failed: {outcome.reason}")
        lines = list(journal.read(folder))
        megabytes = max(path.stat().st_size for path in Path(folder).glob("checkpoints/*/state.pt")) / 1e6
    ended_at = {line["step"]: line["time"] for line in lines if line["kind"] == "step"}
    last = max(ended_at)
    blocked = [
        line["time"] - ended_at[line["step"]]
        for line in lines
        if line["kind"] == "checkpoint" and line["step"] < last  # the one at the end delays nothing
    ]
    threads = next(line["threads"] for line in lines if line["kind"] == "execution")
    return Timing(ended_at[last] - ended_at[WARM_UP_STEPS], blocked, threads, megabytes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=48, help="of each run")
    parser.add_argument("--every", type=int, default=12, help="steps from checkpoint to checkpoint")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the bar is missed")
    chosen = parser.parse_args(arguments)
    model = {"width": chosen.width, "layers": chosen.layers}
    run(values(WARM_UP_STEPS + 1, chosen.steps, model))  # compiles LAMB's update, once for the process
    rows, lost = [], []
    for number in range(chosen.pairs):
        order = (chosen.every, chosen.steps + 1)  # the second: none but the one at the end
        taken = {
            every: run(values(chosen.steps, every, model)) for every in (order if number % 2 else order[::-1])
        }
        saving, plain = (taken[every] for every in order)
        count = len(saving.blocked_s)
        lost_s = (saving.seconds - plain.seconds) / count
        if plain.threads == saving.threads:  # otherwise the two do not compare
            lost.append(lost_s)
        step_ms = 1000 * plain.seconds / (chosen.steps - WARM_UP_STEPS)
        threads = f"{plain.threads}, {saving.threads}"
        blocked_ms = 1000 * statistics.median(saving.blocked_s)
        times = (f"{plain.seconds:.2f}", f"{saving.seconds:.2f}")
        costs = (f"{blocked_ms:.0f}", f"{1000 * lost_s:.0f}")
        rows.append([*times, count, f"{step_ms:.0f}", threads, *costs])
    print(f"a checkpoint has {saving.megabytes:.0f} MB\n")
    head = ["without, s", "with, s", "checkpoints", "step, ms", "threads", "blocked, ms", "lost each, ms"]
    table(head, rows)
    share = 100 * statistics.median(lost) / A_MINUTE_S
    judge([Bar("lost at one checkpoint a minute, %", share, "<=", 1.0)], chosen.check)


if __name__ == "__main__":
    main()

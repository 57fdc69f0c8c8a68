"""What a checkpoint costs the training loop.

    python benchmarks/checkpoint.py [--pairs 3]

A Transformer of 25 million parameters trains with LAMB (300 MB of weights and state), with a checkpoint
every 16 steps and without any, in turns. A checkpoint's cost is what the ten steps after it took beyond ten
steps of the same run during which no checkpoint was written, so that a machine that is slower for a while
does not count; the run without shows that those are as quick as without checkpoints. All is included: the
look for numbers that are not finite, the copy, and what writing in the background takes from it. At one
checkpoint a minute, at most 1 % of the time is the aim. Checkpoints are written below the working folder,
and removed.
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

from trials import Bar, check_bars, table

from trainer import task
from trainer.plan.plan import resolve
from trainer.recipe import loader as recipes
from trainer.run_folder import journal
from trainer.worker import RunSpec, run_worker

WARM_UP_STEPS = 6
WRITING_STEPS = 10  # after which a checkpoint is written, with room
A_MINUTE_S = 60.0


@dataclass(frozen=True)
class Timing:
    """One run after its first steps: the median step while nothing was written, all
    that each checkpoint cost, and the wait until its `save` returned.
    """

    step_s: float
    lost_s: list[float]
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
    parsed = recipes.parse(json.dumps(recipe))
    make_task = partial(task.make, parsed.task.use, parsed.task.with_)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=Path.cwd()) as folder:
        outcome = run_worker(RunSpec(resolve(parsed), folder, make_task))
        if outcome.status != "FINISHED":
            raise SystemExit(f"the run failed: {outcome.reason}")
        lines = list(journal.read(folder))
        megabytes = max(path.stat().st_size for path in Path(folder).glob("checkpoints/*/state.pt")) / 1e6
    ended_at = {line["step"]: line["time"] for line in lines if line["kind"] == "step"}
    seconds = {step: ended_at[step] - ended_at[step - 1] for step in ended_at if step > WARM_UP_STEPS}
    saved_at = {
        line["step"]: line["time"]
        for line in lines
        if line["kind"] == "checkpoint" and line["step"] + WRITING_STEPS <= max(ended_at)
    }
    after_saves = {step: range(step + 1, step + 1 + WRITING_STEPS) for step in saved_at}
    alone_s = statistics.median(
        second for step, second in seconds.items() if not any(step in after for after in after_saves.values())
    )
    return Timing(
        step_s=alone_s,
        lost_s=[sum(seconds[step] - alone_s for step in after) for after in after_saves.values()],
        blocked_s=[time - ended_at[step] for step, time in saved_at.items()],
        threads=next(line["threads"] for line in lines if line["kind"] == "execution"),
        megabytes=megabytes,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64, help="of each run")
    parser.add_argument("--every", type=int, default=16, help="steps from checkpoint to checkpoint")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the bar is missed")
    chosen = parser.parse_args(arguments)
    model = {"width": chosen.width, "layers": chosen.layers}
    run(values(WARM_UP_STEPS + 1, chosen.steps, model))  # compiles LAMB's update, once for the process
    rows, lost_s = [], []
    for number in range(chosen.pairs):
        order = (chosen.every, chosen.steps + 1)  # the second: none but the one at the end
        turns = order if number % 2 else order[::-1]
        taken = {every: run(values(chosen.steps, every, model)) for every in turns}
        saving, plain = (taken[every] for every in order)
        lost_s += saving.lost_s
        threads = f"{plain.threads}, {saving.threads}"
        steps_ms = (f"{1000 * plain.step_s:.1f}", f"{1000 * saving.step_s:.1f}")
        costs_ms = (
            " ".join(f"{1000 * cost:.0f}" for cost in costs) for costs in (saving.blocked_s, saving.lost_s)
        )
        rows.append([threads, *steps_ms, *costs_ms])
    print(f"a checkpoint has {saving.megabytes:.0f} MB; each row is a pair of runs, times in ms\n")
    table(["threads", "step without checkpoints", "step between them", "blocked", "lost for each"], rows)
    share = 100 * statistics.median(lost_s) / A_MINUTE_S
    check_bars([Bar("lost at one checkpoint a minute, %", share, "<=", 1.0)], chosen.check)


if __name__ == "__main__":
    main()

"""What a trial of a sweep costs in a live worker group beyond its training, in CPU milliseconds.

Trials of one step, trained one by one and stacked, beside the floor: the same step and evaluation of the
same model in plain torch. Then trials with small and large micro-batches, whose evaluations cost the same.

    python benchmarks/sweep.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cluster.experiments import plan as plans
from cluster.experiments.course import Order
from cluster.experiments.runner import Runner
from cluster.experiments.trials import Cell
from trainer.distributed.group import WorkerGroup
from trainer.plan.inputs import Inputs

SWEEP = Path(__file__).resolve().parents[1] / "configs" / "sweeps" / "digits.yaml"
STACKED = 6  # trials in one tensor program
TRIALS = 12  # per round


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = plans.read(SWEEP)
    growth = plan.sweep.target.evaluate.growth
    alone, stacked = Runner(growth, WorkerGroup()), Runner(growth, WorkerGroup())
    alone.alone = dict.fromkeys(plan.arms, "as the benchmark asks")

    def orders(batch: int, number: int, limit: int = 1) -> list[Order]:
        cell = Cell("momentum", batch)
        return [
            Order(cell, 0.1, seed, "search", limit, plan.recipe(cell, 0.1, seed)) for seed in range(number)
        ]

    def one_by_one(batch: int, limit: int) -> None:
        for order in orders(batch, TRIALS, limit):
            alone.run([order])

    def together() -> None:
        for _ in range(TRIALS // STACKED):
            stacked.run(orders(64, STACKED))

    ways: dict[str, Callable[[], None]] = {
        "floor": _floor(Inputs.of(plan.arms["momentum"])),
        "one by one": lambda: one_by_one(64, 1),
        f"{STACKED} stacked": together,
        "40 steps of 4": lambda: one_by_one(4, 40),
        "40 steps of 64": lambda: one_by_one(64, 40),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):  # the first one warms up
        for name, way in ways.items():
            began_at = time.process_time()
            way()
            found[name].append((time.process_time() - began_at) / TRIALS * 1000)
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    for name, median in medians.items():
        beyond = f"{median - medians['floor']:8.1f} beyond the floor" if "steps" not in name else ""
        print(f"{name:16} {median:8.1f} ms CPU per trial {beyond}")
    return 0


def _floor(inputs: Inputs) -> Callable[[], None]:
    """One step and one evaluation in plain torch."""
    import numpy as np

    task = inputs.task
    train, validation = (
        {
            key: torch.from_numpy(np.stack([source[i][key] for i in range(len(source))]))
            for key in ("pixels", "label")
        }
        for source in (inputs.sources["train"], inputs.sources["validation"])
    )

    def one() -> None:
        model = task.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        total, count = task.loss(model, {key: value[:64] for key, value in train.items()})
        (total / count).backward()
        optimizer.step()
        with torch.inference_mode():
            task.metrics(model, validation)

    def all_trials() -> None:
        for _ in range(TRIALS):
            one()

    return all_trials


if __name__ == "__main__":
    sys.exit(main())

"""What bringing a trial of a sweep into MLflow costs next to the fewest calls that make a run.

    python benchmarks/tracking.py [--trials 100] [--rounds 5]

The floor is `create_run`, one `log_batch` with as many entries, and `set_terminated`, by hand.
Both write to one SQLite database and take turns. Shown are CPU milliseconds of this process per trial, the
median of the rounds, and the median of their ratios; 40 ms are the aim.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from trainer.run_folder import layout
from trainer.run_folder.journal import Journal
from trainer.tracking import writer

POINTS = 60  # of a trial's curve
AIM_MS = 40.0


def main(arguments: list[str] | None = None) -> None:
    """Compare both, round after round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help="trials in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    os.environ |= writer.QUIET_MLFLOW
    with tempfile.TemporaryDirectory() as folder:
        ours, floor = measured(Path(folder), options.trials, options.rounds)
    ratio = statistics.median(a / b for a, b in zip(ours, floor, strict=True))
    mine, least = statistics.median(ours), statistics.median(floor)
    verdict = "met" if mine <= AIM_MS else "MISSED"
    print("| | CPU ms a trial |\n| --- | --- |")
    print(f"| create_run, log_batch, set_terminated | {least:.1f} |\n| a sweep's tracker | {mine:.1f} |")
    print(f"\nratio {ratio:.2f}\nCPU ms a trial: {mine:.1f}, to be <= {AIM_MS:g}: {verdict}")


def measured(folder: Path, trials: int, rounds: int) -> tuple[list[float], list[float]]:
    """CPU milliseconds a trial of each round: of our tracker, and of the floor."""
    uri = f"sqlite:///{folder}/mlflow.db"
    journal = Journal(folder)
    track = {"uri": uri, "experiment": "default"}
    told = {
        "name": "sweep",
        "target": {"metric": "loss", "at_most": 0.2},
        "recipes": {"lamb": {"track": track}},
    }
    journal.write("sweep", arms=["lamb", "adam"], batches=[64], **told)
    (folder / layout.SWEEP).touch()
    tracker = writer.tracker(folder)
    tracker.prepare()
    client, experiment = MlflowClient(uri), MlflowClient(uri).create_experiment("by hand")
    ours, floor = [], []
    for number in range(rounds + 1):
        for seed in range(trials):
            journal.write("trial", **trial(number * trials + seed))
        ours.append(cpu_ms(tracker.write) / trials)
        floor.append(cpu_ms(lambda: by_hand(client, experiment, trials)) / trials)
    journal.close()
    return ours[1:], floor[1:]  # the first round warms both up


def trial(seed: int) -> dict[str, object]:
    """The fields of a trial's line."""
    cell = {"arm": "lamb", "batch": 64, "axes": {}, "rate": 0.03, "seed": seed, "stage": "search"}
    lengths = {"steps": 99.5, "trained_steps": 100, "examples": 6400, "seconds": 0.5}
    curve = [(step, 2.0 / step) for step in range(1, POINTS + 1)]
    return {"key": f"{seed:016x}", "end": "reached", "curve": curve, **cell, **lengths}


def by_hand(client: MlflowClient, experiment: str, runs: int) -> None:
    """Some runs, each with what a trial has."""
    for _ in range(runs):
        run_by_hand(client, experiment)


def run_by_hand(client: MlflowClient, experiment: str) -> None:
    """One run."""
    run = client.create_run(experiment, run_name="lamb batch=64 rate=0.03 seed=0")
    now_ms = round(time.time() * 1000)
    curve = [Metric("validation/loss", 2.0 / step, now_ms + step, 64 * step) for step in range(1, POINTS + 1)]
    names = ("feasible", "trained_steps", "steps_to_target", "examples_to_target", "seconds_to_target")
    scalars = [Metric(name, 1.0, now_ms, 0) for name in names]
    params = [Param(name, "1") for name in ("arm", "batch", "rate", "seed", "stage")]
    client.log_batch(run.info.run_id, metrics=[*curve, *scalars], params=params)
    client.set_terminated(run.info.run_id)


def cpu_ms(action: Callable[[], object]) -> float:
    """CPU milliseconds of this process that an action takes."""
    began_at = time.process_time()
    action()
    return 1000 * (time.process_time() - began_at)


if __name__ == "__main__":
    main()

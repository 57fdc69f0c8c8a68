"""From the command to the first training step, stage by stage, and from a failure to the next step.

    python -m benchmarks.startup [--rounds 5]

Runs `lockstep train` on a shortened quickstart in a fresh folder, in one process (`--local`) and on two Ray
workers with MLflow on, and prints when each line of the start appeared; then kills a worker of a long run and
waits for its group's next step, and kills its driver and resumes it. Medians over the rounds. The floor, in
the same run, is a Python that imports torch and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from cluster import driver, ray_cluster, ray_launcher
from cluster.console import Console
from tests.cluster.processes import descendants, remaining
from trainer.run_folder import layout
from trainer.run_folder.journal import Journal, read

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
SHORT = ("--set", "train.epochs=2")
LONG = ("--set", "train.epochs=100000", "--set", "checkpoint.every.steps=50", "--set", "eval.every=null")
WAYS = {"--local": ["--local", "--set", "track.uri=none"], "Ray, 2 workers, MLflow on": []}


def torch_alone_s() -> float:
    """Seconds of a process that only imports torch."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def start(arguments: list[str]) -> dict[str, float]:
    """Seconds after the command at which each stage of one run was reached."""
    command = [sys.executable, "-m", "cluster.cli", "train", str(RECIPE), *SHORT, *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    reached: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        began, began_at = time.perf_counter(), time.time()
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for text in process.stdout:
                reached.setdefault("first line", time.perf_counter() - began)
                if text.startswith("  run folder"):
                    reached["plan on the screen"] = time.perf_counter() - began
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        for line in lines(Path(folder)):
            if line["kind"] == "stage":
                reached[f"stage: {line['name']}"] = line["time"] - began_at
            if line["kind"] == "step":
                reached.setdefault("first training step", line["time"] - began_at)
                reached["last training step"] = line["time"] - began_at
        reached["the prompt"] = time.perf_counter() - began
        reached["last step to the prompt"] = reached["the prompt"] - reached["last training step"]
        if not arguments:
            reached["telling MLflow all of it"] = told_anew_s(Path(folder))
    return reached


def told_anew_s(folder: Path) -> float:
    """Seconds of `lockstep sync`, which brings the one run in a folder to an MLflow that knows nothing."""
    (run,) = folder.glob("runs/*")
    (run / layout.TRACKING).unlink()
    (folder / "mlflow.db").unlink()
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "cluster.cli", "sync", str(run)],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def lines(folder: Path) -> list[dict]:
    """The journal of the one run in a folder, as far as it goes."""
    found = [path.read_text().splitlines() for path in folder.glob("runs/*/journal.jsonl")]
    return [json.loads(line) for text in found for line in text if line.endswith("}")]


def first_step_after(folder: Path, moment: float, kind: str) -> float:
    """Seconds from a moment to the first step that follows a line of a kind, both later than it."""
    while True:
        later = [line for line in lines(folder) if line["time"] > moment]
        kinds = [line["kind"] for line in later]
        if kind in kinds and "step" in kinds[kinds.index(kind) :]:
            return later[kinds.index("step", kinds.index(kind))]["time"] - moment
        time.sleep(0.05)


@contextmanager
def long_run(folder: Path, *command: str) -> Iterator[subprocess.Popen]:
    """A run on Ray that goes on until the body ends."""
    whole = [sys.executable, "-m", "cluster.cli", *command]
    process = subprocess.Popen(whole, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def after_failures() -> dict[str, float]:
    """Seconds from a worker's death to its group's next step, and from `lockstep resume` to its first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with long_run(folder, "train", str(RECIPE), *LONG) as process:
            while not list(folder.glob("runs/*/checkpoints/step-*")):
                time.sleep(0.1)
            workers = [each for each in descendants(process.pid) if each.command.startswith("ray::Worker")]
            moment = time.time()
            os.kill(workers[-1].pid, signal.SIGKILL)
            restarted_s = first_step_after(folder, moment, "start")
            family = descendants(process.pid)
            process.kill()
        remaining(family)  # its cluster ends with it, which is not what resuming takes
        moment = time.time()
        with long_run(folder, "resume", "quickstart"):
            resumed_s = first_step_after(folder, moment, "start")
    return {"worker's death to next step": restarted_s, "resume to first step": resumed_s}


def second_group_s() -> float:
    """Seconds to the first step of a run on a live cluster in which another run has just ended."""
    with tempfile.TemporaryDirectory() as name, chdir(name):
        console = Console(open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
        contexts = []
        for number in (1, 2):
            planned = driver.prepare(str(RECIPE), ["train.epochs=2", f"name=run{number}"], console)
            folder = layout.create("runs", planned.recipe.name)
            spec = driver.run_spec(planned.plan, folder, {})
            contexts.append(driver.LaunchContext(spec, folder, Journal(folder), console))
        os.environ.update(ray_launcher.CALM)
        with ray_cluster.connected(None, 8, contexts[0].phase, contexts[0].console.say):
            ray_launcher.train_on_ray(contexts[0], time.time(), is_ours=True)
            moment = time.time()
            ray_launcher.train_on_ray(contexts[1], moment, is_ours=True)
        steps = [line for line in read(contexts[1].folder) if line["kind"] == "step"]
    return steps[0]["time"] - moment


def in_a_process_of_its_own_s() -> float:
    """As `second_group_s`: Ray remembers the token of the first cluster that a process starts."""
    code = "from benchmarks.startup import second_group_s; print(second_group_s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    floors: list[float] = []
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        floors.append(torch_alone_s())
        for way, arguments in WAYS.items():
            found[way].append(start(arguments))
        found.setdefault("after that", []).append(
            {**after_failures(), "a second group in a live cluster": in_a_process_of_its_own_s()}
        )
    floor = statistics.median(floors)
    print(f"import torch alone: {floor:.1f} s")
    for way, starts in found.items():
        print(f"{way}:")
        for stage in starts[0]:
            seconds = [one[stage] for one in starts if stage in one]
            print(
                f"  {stage:<28} {statistics.median(seconds):5.1f} s  (from {min(seconds):.1f} to "
                f"{max(seconds):.1f}; {statistics.median(seconds) / floor:.1f} x import torch)"
            )


if __name__ == "__main__":
    main()

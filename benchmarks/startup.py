"""From the command to the first training step, stage by stage.

    python benchmarks/startup.py [--rounds 3]

Runs `lockstep train` on a shortened quickstart in a fresh folder, in one process (`--local`) and on Ray
workers, and prints when each line of the start appeared, medians over the rounds. The floor next to them, in
the same run, is a Python that imports torch and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
SHORT = ("--set", "train.epochs=2", "--set", "track.uri=none")
WAYS = {"--local": ["--local"], "Ray, 2 workers": []}


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
            for line in process.stdout:
                reached.setdefault("first line", time.perf_counter() - began)
                if line.startswith("  run folder"):
                    reached["plan on the screen"] = time.perf_counter() - began
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        (journal,) = Path(folder).glob("runs/*/journal.jsonl")
        for line in map(json.loads, journal.read_text().splitlines()):
            if line["kind"] == "stage":
                reached[f"stage: {line['name']}"] = line["time"] - began_at
            if line["kind"] == "step":
                reached.setdefault("first training step", line["time"] - began_at)
        reached["finished"] = time.perf_counter() - began
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    floors: list[float] = []
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        floors.append(torch_alone_s())
        for way, arguments in WAYS.items():
            found[way].append(start(arguments))
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

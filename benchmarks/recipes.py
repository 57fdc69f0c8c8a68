"""Run the recipes in configs/ and write what they reach into their headers.

    python benchmarks/recipes.py [--seeds 5] [RECIPE ...]

Each is trained in one process, once per seed (`lockstep train RECIPE --local`), from the working folder; its
runs go to a temporary one. The line `# Measured: ...` of the recipe's header is rewritten.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from trainer.run_folder import journal

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MEASURED = re.compile(r"^# Measured: .*\n", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the recipes that are asked for, or all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipes", nargs="*", type=Path, default=sorted(CONFIGS.glob("*.yaml")), metavar="RECIPE"
    )
    parser.add_argument("--seeds", type=int, default=5)
    chosen = parser.parse_args(arguments)
    for recipe in chosen.recipes:
        try:
            runs = [run(recipe, seed) for seed in range(chosen.seeds)]
        except subprocess.CalledProcessError:  # it has said why
            print(f"{recipe}: did not run; its header stays as it is", flush=True)
            continue
        write(recipe, measured(runs))
        print(f"{recipe}: {measured(runs)}", flush=True)


def run(recipe: Path, seed: int) -> tuple[dict[str, float], float]:
    """The test metrics of one run, and the seconds from the command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"seed={seed}", f"checkpoint.dir={folder}/runs", "track.uri=none"]
        command = [sys.executable, "-m", "cluster.cli", "train", str(recipe), "--local"]
        started = time.monotonic()
        subprocess.run(
            [*command, *(part for override in overrides for part in ("--set", override))],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.monotonic() - started
        (kept,) = Path(folder, "runs").iterdir()
        tests = [
            line for line in journal.read(kept) if line["kind"] == "evaluation" and line["split"] == "test"
        ]
        return tests[-1]["metrics"], seconds


def measured(runs: list[tuple[dict[str, float], float]]) -> str:
    """Mean and standard deviation of each metric over the seeds, and the median time."""
    parts = []
    for name in runs[0][0]:
        values = [metrics[name] for metrics, _ in runs]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        parts.append(f"test {name} {statistics.mean(values):.3f}{spread}")
    seconds = statistics.median(seconds for _, seconds in runs)
    seeds = f"seeds 0 to {len(runs) - 1}" if len(runs) > 1 else "seed 0"
    where = f"--local on {os.cpu_count()} cores, {date.today():%Y-%m-%d}"
    return f"{', '.join(parts)} ({seeds}); {seconds:.0f} s from the command to the end ({where})"


def write(recipe: Path, result: str) -> None:
    """Put the result at the end of the recipe's header, in place of an older one."""
    text = MEASURED.sub("", recipe.read_text(encoding="utf-8"))
    header = re.match(r"(?:#.*\n)*", text)
    end = header.end() if header else 0
    recipe.write_text(f"{text[:end]}# Measured: {result}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()

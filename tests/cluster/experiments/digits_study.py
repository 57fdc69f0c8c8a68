"""The stored study of five optimizers on digits (tests/data/README.md): a study, and a sweep's folder."""

import gzip
import json
from functools import cache
from pathlib import Path

from cluster.experiments.curve import Curve, curves
from cluster.experiments.trials import Study

JOURNAL = Path(__file__).parents[2] / "data/digits_sweep.jsonl.gz"
OPTIMIZERS = ("sgd", "momentum", "lars", "lamb", "adam")


def lines() -> list[dict]:
    with gzip.open(JOURNAL, "rt") as file:
        return [json.loads(line) for line in file]


@cache
def study() -> Study:
    return Study.of(Path("digits-001"), lines())


@cache
def digits() -> dict[str, Curve]:
    return {curve.name: curve for curve in curves(study())}


def folder(parent: Path, changed: dict | None = None) -> Path:
    """A sweep's folder with the study's journal; `changed` are fields of its line `sweep`."""
    path = parent / "digits-001"
    path.mkdir(parents=True)
    (path / "sweep.yaml").touch()
    first, *rest = lines()
    with open(path / "journal.jsonl", "w") as file:
        for line in (first | (changed or {}), *rest):
            file.write(json.dumps(line) + "\n")
    return path

"""Runs on faulty data, from the recipe to the end: right values, or a refusal that names the place."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data_echo import ImageFolderSource, ParquetSource, Source, images
from tests.trainer.plans import planned, spec
from tests.trainer.reproducibility import recipe
from trainer.errors import RecipeError
from trainer.plan import report
from trainer.recipe.schema import Recipe
from trainer.run_folder import journal
from trainer.worker import run_worker

SHADES = {"black": 0, "grey": 128, "white": 255}
BATCH = {"size": 16, "micro": 4, "lanes": 2}
SHORT = recipe(train={"epochs": 2}, batch=BATCH, echo={"factor": 1, "capacity": 16})
BLOCKS = recipe(
    train={"epochs": 2},
    batch={**BATCH, "shuffle": {"block": 8, "window": 1}},
    echo={"factor": 1, "capacity": 16},
)


class Rows:
    """A line through the rows of Parquet files; the task makes floats of targets whose x is above a bound."""

    def __init__(self, folder: Path, floats_above: float = 1.0) -> None:
        self.folder, self.floats_above = folder, floats_above

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def source(self, split: str) -> Source:
        return ParquetSource(self.folder)

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        x, y = example["x"], example["y"]
        return {"x": np.float32([x]), "y": np.float64(y) if x > self.floats_above else y}

    def augment(self, batch: dict[str, Tensor], draw: Any) -> dict[str, Tensor]:
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        error = model(batch["x"])[:, 0] - batch["y"].float()
        return (error**2).sum(), torch.tensor(len(error))

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return {"sum": (batch["y"].double().abs().sum(), torch.tensor(len(batch["y"])))}


def write(path: Path, dtype: str) -> None:
    x = np.linspace(0, 1, 32)
    pq.write_table(pa.table({"x": x, "y": pa.array((2 * x).round().astype(dtype))}), path)


def test_files_whose_column_changes_its_type_are_refused_before_the_run(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", "int64")
    write(tmp_path / "1.parquet", "float64")
    with pytest.raises(
        RecipeError, match=r"'y' is int64 in \S*0.parquet, double in \S*1.parquet \(\S+\); one type in"
    ):
        planned(SHORT, Rows(tmp_path))


@pytest.mark.parametrize("chosen", [SHORT, BLOCKS], ids=["by row", "in blocks"])
def test_a_task_whose_dtype_changes_ends_the_run_with_both_examples(tmp_path: Path, chosen: Recipe) -> None:
    write(tmp_path / "0.parquet", "int64")
    outcome = run_worker(spec(chosen, tmp_path, lambda: Rows(tmp_path, floats_above=0.5)))
    assert outcome.status == "FAILED"
    both = r"y: int64 in example 0 \(\S*0.parquet:0\), float64 in example \d+ \("
    assert re.search(both, outcome.reason), outcome.reason
    assert [line["reason"] for line in journal.read(tmp_path) if line["kind"] == "end"] == [outcome.reason]


def test_files_of_one_type_train_on_their_values(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", "float64")
    write(tmp_path / "1.parquet", "float64")
    outcome = run_worker(spec(BLOCKS, tmp_path, lambda: Rows(tmp_path)))
    assert outcome.metrics["sum"] == pytest.approx(1.0, abs=0.1)


class Shades:
    """Pictures of one shade for each class; the model is told the classes and counts how many are right."""

    def __init__(self, folder: Path, **classes: Any) -> None:
        self.folder, self.classes = folder, classes

    def model(self) -> nn.Module:
        return nn.Linear(1, 3)

    def source(self, split: str) -> Source:
        return ImageFolderSource(self.folder / split, **self.classes.get(split, {}))

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        return {"image": images.decode(example["image"]), "label": example["label"]}

    def augment(self, batch: dict[str, Tensor], draw: Any) -> dict[str, Tensor]:
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(batch["image"].float().mean((1, 2, 3))[:, None] / 255)
        return nn.functional.cross_entropy(logits, batch["label"], reduction="sum"), torch.tensor(len(logits))

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        meant = (batch["image"].float().mean((1, 2, 3)) / 127).round().long()  # black, grey, white
        return {"right": ((meant == batch["label"]).sum(), torch.tensor(len(meant)))}


def shades(folder: Path, *names: str) -> None:
    for name in names:
        for number in range(16):
            (folder / name).mkdir(parents=True, exist_ok=True)
            file = io.BytesIO()
            Image.new("L", (4, 4), SHADES.get(name, 0)).save(file, "PNG")
            (folder / name / f"{number}.png").write_bytes(file.getvalue())


def test_labels_are_right_in_every_split_of_a_run(tmp_path: Path) -> None:
    shades(tmp_path / "train", "black", "grey", "white", ".ipynb_checkpoints")
    shades(tmp_path / "validation", "grey", "white")  # nothing black
    shades(tmp_path / "test", "white", "__MACOSX")
    plan = planned(SHORT, Shades(tmp_path))
    assert [line.split("  ")[-1].strip() for line in report.lines(plan) if line.startswith("left out")] == [
        "train: hidden or system names: 1 (.ipynb_checkpoints)",
        "test: hidden or system names: 1 (__MACOSX)",
    ]
    run_worker(spec(SHORT, tmp_path, lambda: Shades(tmp_path)))
    evaluations = [line for line in journal.read(tmp_path) if line["kind"] == "evaluation"]
    assert {line["split"] for line in evaluations} == {"validation", "test"}
    assert all(line["metrics"]["right"] == 1 for line in evaluations)


def test_splits_that_number_other_classes_are_refused(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        shades(tmp_path / split, "black", "grey")
    wrong = Shades(tmp_path, test={"classes": ["grey", "black"]})
    with pytest.raises(
        RecipeError, match=r"the test split of .* has the classes grey, black, train black, grey"
    ):
        planned(SHORT, wrong)

"""scikit-learn's handwritten digits: 1,797 pictures of 8 × 8, in 17 shades, bundled with the package."""

import gzip
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_echo import ArraySource

if TYPE_CHECKING:
    from data_echo import Draws, Source

HELD_OUT = {"test": slice(0, 250), "validation": slice(250, 500), "train": slice(500, None)}
SHADES = 16.0


class Digits:
    """A small multilayer perceptron on 1,297 training, 250 validation and 250 test pictures."""

    def __init__(self, hidden: int = 128) -> None:
        if hidden < 1:
            raise ValueError(f"hidden is {hidden}; give 1 or more")
        self.hidden = hidden

    def model(self) -> nn.Module:
        """64 pixels, one hidden layer of `hidden` ReLU units, 10 logits."""
        return nn.Sequential(nn.Linear(64, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 10))

    def source(self, split: str) -> "Source":
        """Examples {"pixels": uint8 [64], "label": int64}; the splits have the classes in equal parts."""
        pixels, labels = read_digits()
        rows = stratified(labels)[HELD_OUT[split]]
        return ArraySource({"pixels": pixels[rows], "label": labels[rows]})

    def prepare(self, example: dict[str, Any], draw: "Draws") -> dict[str, Any]:
        """As it is: the pixels travel as uint8."""
        return example

    def augment(self, batch: dict[str, Tensor], draw: "Draws") -> dict[str, Tensor]:
        """Nothing: so few pixels need no augmentation."""
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy, in nats."""
        logits = model(batch["pixels"].float() / SHADES)
        return functional.cross_entropy(logits, batch["label"], reduction="sum"), count(batch["label"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Loss in nats and accuracy."""
        logits = model(batch["pixels"].float() / SHADES)
        label, examples = batch["label"], count(batch["label"])
        return {
            "loss": (functional.cross_entropy(logits, label, reduction="sum"), examples),
            "accuracy": ((logits.argmax(1) == label).sum(), examples),
        }


def count(label: Tensor) -> Tensor:
    """The number of examples of a batch, as a tensor beside it."""
    return torch.tensor(len(label), device=label.device)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 [1797, 64], labels int64 [1797]), from the file: importing scikit-learn takes seconds."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the digits come with scikit-learn; install scikit-learn", name="sklearn")
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1], table[:, -1].astype(np.int64)


def stratified(labels: np.ndarray) -> np.ndarray:
    """Rows in a fixed order in which every stretch holds the classes in nearly their overall shares."""
    shuffled = np.random.Generator(np.random.Philox(0)).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = shuffled[labels[shuffled] == label]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.argsort(place, kind="stable")

"""scikit-learn's handwritten digits: 1,797 pictures of 8 × 8, in 17 shades, bundled with the package.

torch is imported where it is used, so that the processes of the pool prepare examples without it.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_echo import ArraySource
from trainer.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from data_echo import Draw, Draws, Source
    from trainer.tasks.classification import Sum

HELD_OUT = {"test": slice(0, 250), "validation": slice(250, 500), "train": slice(500, None)}
SHADES = 16.0


class Digits:
    """A small multilayer perceptron on 1,297 training, 250 validation and 250 test pictures.

    Args:
        hidden: units of the hidden layer.
        label_smoothing: fraction of each label that is spread over all classes.
    """

    def __init__(self, hidden: int = 128, label_smoothing: float = 0.0) -> None:
        if hidden < 1:
            raise InvalidValueError(f"hidden is {hidden}", "give 1 or more")
        if not 0 <= label_smoothing < 1:
            raise InvalidValueError(
                f"label_smoothing is {label_smoothing}", "give a fraction from 0 to less than 1"
            )
        self.hidden, self.label_smoothing = hidden, label_smoothing

    def model(self) -> nn.Module:
        """64 pixels, one hidden layer of `hidden` ReLU units, 10 logits."""
        from trainer.tasks import networks

        return networks.perceptron(64, self.hidden, 10)

    def source(self, split: str) -> Source:
        """Examples {"pixels": uint8 [64], "label": int64}; the splits have the classes in equal parts."""
        pixels, labels = read_digits()
        rows = stratified(labels)[HELD_OUT[split]]
        return ArraySource({"pixels": pixels[rows], "label": labels[rows]})

    def prepare(self, example: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """As it is: the pixels travel as uint8."""
        return example

    def augment(self, batch: dict[str, Tensor], draw: Draws) -> dict[str, Tensor]:
        """Nothing: so few pixels need no augmentation."""
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Sum:
        """Cross-entropy, in nats."""
        from trainer.tasks import classification

        return classification.loss(_logits(model, batch), batch["label"], self.label_smoothing)

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Sum]:
        """Loss in nats and accuracy."""
        from trainer.tasks import classification

        return classification.metrics(_logits(model, batch), batch["label"])


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["pixels"].float() / SHADES)


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

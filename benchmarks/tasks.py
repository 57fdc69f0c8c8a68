"""Tasks that only the benchmarks need."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from data_echo import ArraySource, Draw, Draws
from trainer.tasks import classification
from trainer.tasks.digits import HELD_OUT, Digits, read_digits, stratified
from trainer.tasks.networks import Transformer

HELD_OUT_DIGITS = 250


class DigitsFold(Digits):
    """The digits with another 250 of them held out for the test, and another 250 for validation.

    Args:
        fold: 0 to 6; 0 holds out what `Digits` does, and no picture is in the test of two folds.
        label_smoothing: share of each label that is spread over all classes.
    """

    def __init__(self, fold: int, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        if not 0 <= fold < 7:
            raise ValueError(f"fold is {fold}; give one from 0 to 6")
        self.fold = fold

    def source(self, split: str) -> ArraySource:
        """As `Digits`, its rows turned by the fold."""
        pixels, labels = read_digits()
        rows = np.roll(stratified(labels), -self.fold * HELD_OUT_DIGITS)[HELD_OUT[split]]
        return ArraySource({"pixels": pixels[rows], "label": labels[rows]})


class Signals:
    """Noisy one-dimensional signals of ten shapes, after MNIST-1D (Greydanus 2020, arXiv:2011.14439).

    Every class has a smooth template of 12 points. An example is its class's template stretched, shifted,
    sheared and scaled at random, with correlated and white noise, read at 40 places. A few thousand are soon
    learned by heart, and how training ends decides how well others are recognised. The model is a perceptron
    40-100-100-10.
    """

    EXAMPLES: ClassVar = {"train": 4000, "validation": 1000, "test": 4000}

    def model(self) -> nn.Module:
        """40 numbers in, 10 logits out."""
        return nn.Sequential(
            nn.Linear(40, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )

    def source(self, split: str) -> ArraySource:
        """Examples {"signal": float32 [40], "label": int64}, the same ones every time."""
        signals, labels = signals_of(split, self.EXAMPLES[split])
        return ArraySource({"signal": signals, "label": labels})

    def prepare(self, example: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """As it is."""
        return example

    def augment(self, batch: dict[str, Tensor], draw: Draws) -> dict[str, Tensor]:
        """Nothing."""
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> classification.Sum:
        """Cross-entropy in nats."""
        return classification.loss(model(batch["signal"]), batch["label"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, classification.Sum]:
        """Loss in nats and accuracy."""
        return classification.metrics(model(batch["signal"]), batch["label"])


@lru_cache(maxsize=3)
def signals_of(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(signals float32 [count, 40], labels int64 [count]) of a split, of unit variance overall."""
    templates = np.random.default_rng(0).normal(size=(10, 12)).cumsum(axis=1)
    templates -= templates.mean(axis=1, keepdims=True)
    templates /= templates.std(axis=1, keepdims=True)
    rng = np.random.default_rng([1, *split.encode()])
    labels = np.arange(count) % 10
    places = np.linspace(0, 1, 40)
    signals = np.empty((count, 40), np.float32)
    for row, label in enumerate(labels):
        width, shear, scale = rng.uniform(0.3, 0.6), rng.normal(scale=0.5), rng.uniform(0.6, 1.4)
        start = rng.uniform(0, 1 - width)
        knots = start + width * np.linspace(0, 1, 12)
        shape = scale * np.interp(places, knots, templates[label], left=0, right=0)
        drift = np.convolve(rng.normal(size=48), np.ones(9) / 3, mode="valid")
        signals[row] = shape + shear * (places - 0.5) + 0.4 * drift + 0.05 * rng.normal(size=40)
    return signals, labels


class LargeModel:
    """A Transformer of a useful size on random bytes, with next to no data: what a step costs, not what it
    learns.

    Args:
        width, layers: of the Transformer; 512 and 8 make 25 million parameters.
    """

    CONTEXT = 64
    EXAMPLES: ClassVar = {"train": 256, "validation": 4, "test": 4}

    def __init__(self, width: int = 512, layers: int = 8) -> None:
        self.width, self.layers = width, layers

    def model(self) -> nn.Module:
        """Bytes [n, 64] in, logits [n, 64, 256] out."""
        return Transformer(256, self.CONTEXT, self.width, self.layers, heads=8, dropout=0.0)

    def source(self, split: str) -> ArraySource:
        """Windows {"bytes": uint8 [65]}."""
        shape = (self.EXAMPLES[split], self.CONTEXT + 1)
        return ArraySource({"bytes": np.random.default_rng(0).integers(0, 256, shape, np.uint8)})

    def prepare(self, example: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """As it is."""
        return example

    def augment(self, batch: dict[str, Tensor], draw: Draws) -> dict[str, Tensor]:
        """Nothing."""
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> classification.Sum:
        """Cross-entropy in nats per byte."""
        text = batch["bytes"].long()
        return classification.loss(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, classification.Sum]:
        """Loss in nats per byte."""
        return {"loss": self.loss(model, batch)}

"""CIFAR-10 from Parquet files of encoded images, as Hugging Face lays it out.

torch is imported where it is used, so that the processes of the pool prepare examples without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from data_echo.images import decode
from data_echo.sources.parquet import ParquetSource
from trainer.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from data_echo import Draw, Draws, Source
    from trainer.tasks.classification import Sum

CLASSES = 10
SIDE = 32  # pixels
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, per channel
VALIDATION_EVERY = 10  # every tenth row of the training files is a validation example


class Cifar10:
    """A small convolutional network with batch norm, on 45,000, 5,000 and 10,000 images of the three splits.

    Args:
        path: folder or fsspec address with train-*.parquet and test-*.parquet, columns `img` and `label`.
        width: channels of the first convolution; the others have two and four times as many.
        label_smoothing: fraction of each label that is spread over all classes.
    """

    def __init__(self, path: str, width: int = 32, label_smoothing: float = 0.0) -> None:
        if width < 1:
            raise InvalidValueError(f"width is {width}", "give 1 or more")
        if not 0 <= label_smoothing < 1:
            raise InvalidValueError(
                f"label_smoothing is {label_smoothing}", "give a fraction from 0 to less than 1"
            )
        self.path, self.width, self.label_smoothing = path, width, label_smoothing

    def model(self) -> nn.Module:
        """Three convolutions with batch norm; takes normalised images."""
        from trainer.tasks import networks

        return networks.convolutional(self.width, CLASSES)

    def source(self, split: str) -> Source:
        """Encoded images with labels."""
        name = "test" if split == "test" else "train"
        rows = ParquetSource(f"{self.path}/{name}-*.parquet", columns=["img", "label"])
        if split == "test":
            return rows
        numbers = np.arange(len(rows))
        held_out = numbers % VALIDATION_EVERY == VALIDATION_EVERY - 1
        return Subset(rows, numbers[held_out if split == "validation" else ~held_out])

    def prepare(self, example: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """Decode: {"image": uint8 [32, 32, 3], "label": int64}."""
        image, label = decode(example["img"]), np.int64(example["label"])
        if image.shape != (SIDE, SIDE, 3):
            raise InvalidValueError(
                f"the image is {image.shape[0]} × {image.shape[1]}", f"CIFAR-10's are {SIDE} × {SIDE}"
            )
        if not 0 <= label < CLASSES:
            raise InvalidValueError(f"the label is {label}", f"labels are 0 to {CLASSES - 1}")
        return {"image": image, "label": label}

    def augment(self, batch: dict[str, Tensor], draw: Draws) -> dict[str, Tensor]:
        """A random crop out of four pixels of padding, mirrored half of the time."""
        from data_echo.augment import crop, flip

        return batch | {"image": flip(crop(batch["image"], draw, padding=4), draw)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Sum:
        """Cross-entropy, in nats."""
        from trainer.tasks import classification

        return classification.loss(_logits(model, batch), batch["label"], self.label_smoothing)

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Sum]:
        """Loss in nats and accuracy."""
        from trainer.tasks import classification

        return classification.metrics(_logits(model, batch), batch["label"])


class Subset:
    """Some rows of a source, as a source.

    Args:
        rows: int64, the rows' numbers in `source`.
    """

    def __init__(self, source: ParquetSource, rows: np.ndarray) -> None:
        self._source, self._rows = source, rows
        self.skipped, self.classes = source.skipped, source.classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._rows[index])]

    def origin(self, index: int) -> str:
        """`file:row` in the whole source."""
        return self._source.origin(int(self._rows[index]))

    def fingerprint(self) -> dict[str, Any]:
        """That of the whole source; which rows these are is the task's code."""
        return self._source.fingerprint()


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    from data_echo.augment import normalise

    return model(normalise(batch["image"], MEAN, STD))

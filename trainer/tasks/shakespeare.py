"""Tiny Shakespeare: the next byte of 1.1 MB of plays, by a small causal Transformer.

torch is imported where it is used, so that the processes of the pool prepare examples without it.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from data_echo import Draw, Draws, Source
    from trainer.tasks.classification import Sum

BYTES = 256
SHARES = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}  # of the text, in its order


class Shakespeare:
    """A byte-level language model.

    An example is a window of `context` bytes with the byte that follows each of them. Windows begin at every
    `stride`-th byte in training, and lie end to end in validation and test.

    Args:
        path: the text, a local file.
        context: bytes that the model sees.
        width: of the residual stream.
        layers, heads: of the Transformer.
        dropout: fraction of activations dropped.
        stride: bytes between the beginnings of training windows.
    """

    def __init__(
        self,
        path: str,
        context: int = 64,
        width: int = 96,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        stride: int = 16,
    ) -> None:
        if width % heads:
            raise InvalidValueError(f"width {width} is not a multiple of heads {heads}", "give one that is")
        self.path, self.context, self.stride = path, context, stride
        self.width, self.layers, self.heads, self.dropout = width, layers, heads, dropout

    def model(self) -> nn.Module:
        """Bytes [n, context] in, logits [n, context, 256] out."""
        from trainer.tasks.networks import Transformer

        return Transformer(BYTES, self.context, self.width, self.layers, self.heads, self.dropout)

    def source(self, split: str) -> Source:
        """Windows {"bytes": uint8 [context + 1]}."""
        first, last = SHARES[split]
        text = read_text(self.path)
        part = text[round(first * len(text)) : round(last * len(text))]
        return Windows(part, self.context, self.stride if split == "train" else self.context)

    def prepare(self, example: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """As it is: bytes travel as uint8."""
        return example

    def augment(self, batch: dict[str, Tensor], draw: Draws) -> dict[str, Tensor]:
        """Nothing."""
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Sum:
        """Cross-entropy in nats per byte."""
        from trainer.tasks import classification

        text = batch["bytes"].long()
        logits = model(text[:, :-1])
        return classification.loss(logits.flatten(0, 1), text[:, 1:].flatten())

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Sum]:
        """Loss in nats per byte."""
        return {"loss": self.loss(model, batch)}


class Windows:
    """Overlapping windows of a text as a source.

    Args:
        text: uint8 [n].
        context: a window has one byte more, the last to predict.
        stride: bytes between the beginnings of windows.
    """

    def __init__(self, text: np.ndarray, context: int, stride: int) -> None:
        self._text, self._length, self._stride = text, context + 1, stride

    def __len__(self) -> int:
        return max(0, (len(self._text) - self._length) // self._stride + 1)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._stride
        return {"bytes": self._text[start : start + self._length]}

    def fingerprint(self) -> dict[str, Any]:
        """Length and hash of the text."""
        return {"rows": len(self), "hash": hashlib.sha256(self._text.tobytes()).hexdigest()}


@lru_cache(maxsize=1)
def read_text(path: str) -> np.ndarray:
    """The file's bytes, uint8 [n]."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise InvalidValueError(f"there is no file {path}", "give the path of the text")
    return np.fromfile(file, dtype=np.uint8)

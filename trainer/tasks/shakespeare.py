"""Tiny Shakespeare: the next byte of 1.1 MB of plays, by a small causal Transformer."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from data_echo import Draw, Draws, Source

BYTES = 256
SHARES = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}  # of the text, in its order
Sum = tuple[Tensor, Tensor]


class Shakespeare:
    """A byte-level language model.

    An example is a window of `context` bytes with the byte that follows each of them. Windows begin at every
    `stride`-th byte in training, and lie end to end in validation and test.

    Args:
        path: the text, a local file.
        context: bytes that the model sees.
        width: of the residual stream.
        layers, heads: of the Transformer.
        dropout: share of activations dropped.
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
            raise ValueError(f"width {width} is not a multiple of heads {heads}; give one that is")
        self.path, self.context, self.stride = path, context, stride
        self.width, self.layers, self.heads, self.dropout = width, layers, heads, dropout

    def model(self) -> nn.Module:
        """Bytes [n, context] in, logits [n, context, 256] out."""
        return Transformer(self.context, self.width, self.layers, self.heads, self.dropout)

    def source(self, split: str) -> "Source":
        """Windows {"bytes": uint8 [context + 1]}."""
        first, last = SHARES[split]
        text = read_text(self.path)
        part = text[round(first * len(text)) : round(last * len(text))]
        return Windows(part, self.context, self.stride if split == "train" else self.context)

    def prepare(self, example: dict[str, Any], draw: "Draw") -> dict[str, Any]:
        """As it is: bytes travel as uint8."""
        return example

    def augment(self, batch: dict[str, Tensor], draw: "Draws") -> dict[str, Tensor]:
        """Nothing."""
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Sum:
        """Cross-entropy in nats per byte."""
        text = batch["bytes"].long()
        logits = model(text[:, :-1])
        total = functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="sum")
        return total, torch.tensor(text[:, 1:].numel(), device=text.device)

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


class Transformer(nn.Module):
    """Pre-norm decoder (Radford et al. 2019), one matrix for embedding and logits, learned positions."""

    def __init__(self, context: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.token, self.position):  # logits of about unit size
            nn.init.normal_(embedding.weight, std=width**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        """int64 [n, length] to logits [n, length, 256]; length at most `context`."""
        x = self.token(text) + self.position.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.token.weight.T


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer of four times the width, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, length, width] to the same shape."""
        x = x + self._dropped(self.project(self._attention(self.attention_norm(x))))
        return x + self._dropped(self.contract(functional.gelu(self.expand(self.feed_norm(x)))))

    def _attention(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        split = self.query_key_value(x).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [n, heads, length, width / heads]
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return seen.transpose(1, 2).reshape(n, length, width)

    def _dropped(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x


@lru_cache(maxsize=1)
def read_text(path: str) -> np.ndarray:
    """The file's bytes, uint8 [n]."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; give the path of the text")
    return np.fromfile(path, dtype=np.uint8)

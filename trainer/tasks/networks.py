"""The models of the tasks that ship."""

from torch import Tensor, nn
from torch.nn import functional


def perceptron(features: int, hidden: int, classes: int) -> nn.Module:
    """[n, features] to logits [n, classes] by one hidden layer of ReLU units."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def convolutional(width: int, classes: int) -> nn.Module:
    """Images [n, 3, height, width] to logits [n, classes].

    Three convolutions with batch norm, the resolution halved after two of them, the mean over pixels, logits.
    """
    return nn.Sequential(
        *_convolution(3, width),
        nn.MaxPool2d(2),
        *_convolution(width, 2 * width),
        nn.MaxPool2d(2),
        *_convolution(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def _convolution(channels: int, filters: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]


class Transformer(nn.Module):
    """Pre-norm decoder (Radford et al. 2019), one matrix for embedding and logits, learned positions."""

    def __init__(
        self, symbols: int, context: int, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.token, self.position):  # logits of about unit size
            nn.init.normal_(embedding.weight, std=width**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        """int64 [n, length] to logits [n, length, symbols]; length at most `context`."""
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

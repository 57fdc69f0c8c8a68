"""Loss and metrics of classifiers, as (sum, count) pairs."""

import torch
from torch import Tensor
from torch.nn import functional

Sum = tuple[Tensor, Tensor]


def loss(logits: Tensor, label: Tensor, label_smoothing: float = 0.0) -> Sum:
    """Cross-entropy of logits [n, classes] in nats; smoothing ε gives every class ε / classes of a label."""
    total = functional.cross_entropy(logits, label, reduction="sum", label_smoothing=label_smoothing)
    return total, _count(label)


def metrics(logits: Tensor, label: Tensor) -> dict[str, Sum]:
    """Cross-entropy in nats, never smoothed, and accuracy."""
    return {"loss": loss(logits, label), "accuracy": ((logits.argmax(1) == label).sum(), _count(label))}


def _count(label: Tensor) -> Tensor:
    return torch.tensor(len(label), device=label.device)

import numpy as np
import torch
from torch import nn


class Line:
    """y = slope x + noise: the smallest task that trains."""

    def __init__(self, slope: float = 2.0):
        self.slope = slope

    def model(self):
        return nn.Linear(1, 1)

    def source(self, split):
        return np.linspace(-1, 1, 256 if split == "train" else 64, dtype=np.float32)

    def prepare(self, example, draw):
        return {"x": np.float32([example]), "y": np.float32([self.slope * example])}

    def augment(self, batch, draw):
        return batch | {"y": batch["y"] + 0.01 * draw.normal(1)}

    def loss(self, model, batch):
        error = model(batch["x"]) - batch["y"]
        return (error**2).sum(), torch.tensor(len(error))

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch)}

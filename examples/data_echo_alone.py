"""Data echoing in a training loop of one's own: no recipe, no trainer, NumPy and torch alone.

python examples/data_echo_alone.py
"""

import numpy as np
import torch
from torch import nn

from data_echo import ArraySource, EchoLoader, InlinePreparer, Schedule, augment, order_lines

EXAMPLES, MICRO_BATCHES = 512, 96


class Stripes:
    """Pictures of 8 x 8 pixels with a bright row (label 0) or a bright column (label 1)."""

    def source(self, split: str) -> ArraySource:
        """All pictures: there is one split here."""
        numbers = np.arange(EXAMPLES)
        images = np.random.default_rng(0).integers(0, 128, (EXAMPLES, 8, 8, 1), dtype=np.uint8)
        images[numbers[::2], numbers[::2] % 8, :] = 255
        images[numbers[1::2], :, numbers[1::2] % 8] = 255
        return ArraySource({"image": images, "label": numbers % 2})

    def prepare(self, example, draw):
        """The expensive part, before the echo: decoding, in a real task."""
        return {"image": example["image"], "label": np.int64(example["label"])}


# Two lanes (data shards) on one worker; each example is served twice, its copies shuffled among 128 others.
schedule = Schedule(EXAMPLES, lanes=2, micro=32, factor=2, capacity=128, seed=0)
preparer = InlinePreparer(Stripes(), seed=0)
loader = EchoLoader(schedule, preparer, lanes=range(2), seed=0)

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for j in range(MICRO_BATCHES):
    batch, draw = loader.micro_batch(j)
    images = augment.flip(batch["image"], draw)  # anew for each copy
    images = augment.normalise(images, mean=[0.3], std=[0.3])
    loss = nn.functional.cross_entropy(model(images), batch["label"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

served = MICRO_BATCHES * schedule.micro
print(f"served {served} examples, prepared {preparer.stats.examples}; last loss {loss.item():.3f}")
print("what any micro-batch serves, as pass:index+copy, is known without reading data:")
print(next(order_lines(schedule, 1, first=1_000_001))[:80], "...")

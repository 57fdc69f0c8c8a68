"""An optimizer from `optim` in a training loop of one's own: no recipe, no trainer, torch alone.

python examples/optim_alone.py
"""

import torch
from torch import nn

import optim

torch.manual_seed(0)
inputs = torch.randn(512, 16)
targets = torch.sin(inputs.sum(dim=1, keepdim=True))
model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 1))

# Biases and normalisation layers get neither weight decay nor a trust ratio.
grouping = optim.group_parameters(model)
optimizer = optim.build("lamb", grouping.groups, lr=0.02, weight_decay=0.01)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
average = optim.ema(model, decay=0.98)


def loss_of(network: nn.Module) -> torch.Tensor:
    """The mean squared error over all examples."""
    return nn.functional.mse_loss(network(inputs), targets)


first = loss_of(model).item()
for _ in range(200):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    schedule.step()
    average.update_parameters(model)

print(f"loss {first:.3f} -> {loss_of(model).item():.3f}, averaged weights {loss_of(average).item():.3f}")

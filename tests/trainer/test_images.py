"""A residual network on images: where its weights start, and how it lies in memory."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.trainer.plans import planned
from tests.trainer.reproducibility import CLASSES, EXAMPLES, NoisyTask, Trace, follow, ready, recipe
from trainer.plan import report
from trainer.training import Training


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class Images(NoisyTask):
    """Noise in six by six pixels, labelled by its mean colour."""

    def __init__(self) -> None:
        super().__init__()
        x = np.random.default_rng(1).standard_normal((EXAMPLES, 4, 6, 6)).astype(np.float32)
        self.arrays |= {"x": x, "y": x.mean((2, 3)).argmax(1)}

    def model(self) -> nn.Module:
        trunk = nn.Sequential(Residual(4), Residual(4))
        return nn.Sequential(trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))

    def augment(self, batch: dict[str, Tensor], draw: Any) -> dict[str, Tensor]:
        return batch


def training(run: dict[str, Any] | None = None, **changes: Any) -> Training:
    return ready(recipe(run={"reduction": "fast", "stack": 4, **(run or {})}, **changes), task=Images())


def test_gammas_that_start_at_zero_make_blocks_the_identity_and_are_trained():
    zeroed = training(init={"zero": ["*.bn2.weight"]})
    trunk = zeroed.model[0]
    assert all(not block.bn2.weight.any() and block.bn1.weight.all() for block in trunk)
    images = torch.rand(5, 4, 6, 6)
    assert torch.equal(trunk(images), images)
    other = training().model.state_dict()
    assert all(
        torch.equal(other[name], v) for name, v in zeroed.model.state_dict().items() if "bn2" not in name
    )
    follow(zeroed, Trace([], [], {}, {}, []), 4)
    assert all(block.bn2.weight.all() for block in trunk)


@pytest.mark.parametrize("optimizer", ["lamb", "momentum", "adafactor"])
def test_channels_last_is_kept_by_weights_and_changes_rounding_only(optimizer: str):
    # With a smaller eps LAMB takes steps of full length along gradients that are nothing but rounding.
    rule = {"name": optimizer, "lr": 0.01} | ({"eps": 0.01} if optimizer == "lamb" else {})
    last, first = training({"channels_last": True}, optimizer=rule), training(optimizer=rule)
    seen: list[bool] = []
    last.model[0][1].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    traces = [Trace([], [], {}, {}, []) for _ in range(2)]
    for begun, kept in zip((last, first), traces, strict=True):
        follow(begun, kept, 10)
    assert seen
    assert all(seen)
    kernels = [p for p in last.model.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert all(p.grad.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    np.testing.assert_allclose(traces[0].losses, traces[1].losses, rtol=1e-4)
    for name, weight in first.model.state_dict().items():
        torch.testing.assert_close(last.model.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def test_a_run_may_go_on_with_another_order_of_memory():
    before = training({"channels_last": True})
    follow(before, Trace([], [], {}, {}, []), 3)
    after = ready(recipe(run={"reduction": "fast", "stack": 4}), before.state(), Images())
    states = [begun.state()["optimizer"]["state"]["0.0.conv1.weight"] for begun in (before, after)]
    shared = [name for name, value in states[0].items() if isinstance(value, Tensor) and value.dim() == 4]
    assert shared
    assert all(torch.equal(states[0][name], states[1][name]) for name in shared)
    assert torch.equal(before.model[0][0].conv1.weight, after.model[0][0].conv1.weight)
    losses = []
    for begun in (before, after):
        kept = Trace([], [], {}, {}, [])
        follow(begun, kept, 6)
        losses.append(kept.losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_the_plan_shows_how_steps_are_computed():
    def computation(**changes: Any) -> list[str]:
        lines = report.lines(planned(recipe(**changes), Images()))
        return [line.removeprefix("computation").strip() for line in lines if line.startswith("computation")]

    assert computation() == []
    run = {"reduction": "fast", "recompute": True, "compile": True, "channels_last": True}
    assert computation(run=run, train={"epochs": 6, "precision": "fp16"}) == [
        "fp16 autocast, a loss scale, compiled, channels last, activations of 2 blocks recomputed (0.0, 0.1)"
    ]

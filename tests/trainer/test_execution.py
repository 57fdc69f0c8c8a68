"""How passes run is found by trying: stacked only where the gradient stays the same."""

import pytest
import torch
from torch import nn

from data_echo import InlinePreparer
from tests.trainer.spine import CLASSES, FEATURES, SpineTask, recipe
from trainer import execution
from trainer import plan as planning
from trainer.group import Group
from trainer.passes import Passes
from trainer.training import Training, build


class Plain(SpineTask):
    """No dropout: the forward pass is a function of its micro-batch."""

    def __init__(self):
        super().__init__(dropout=0.0)


class Centred(nn.Module):
    """Takes the mean over whatever it is given: examples of a pass interact."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0))


class Interacting(SpineTask):
    """A model that normalises over the batch without being a batch norm."""

    def model(self) -> nn.Module:
        return Centred()


class Rigid(nn.Module):
    """Insists on one size of batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.view(10, FEATURES))


class Unstackable(SpineTask):
    """A model that cannot take two micro-batches at once."""

    def model(self) -> nn.Module:
        return Rigid()


def training(task: SpineTask, stack: int | str = "auto") -> Training:
    chosen = recipe(run={"reduction": "fast", "stack": stack}, train={"epochs": 1})
    return build(chosen, planning.make(chosen, task), task, Group(), InlinePreparer(task, chosen.seed))


def test_dropout_keeps_micro_batches_apart():
    found = training(SpineTask()).passes.execution
    assert (found.stack, found.draws_random) == (1, True)
    assert "draws random numbers" in found.reason


@pytest.mark.parametrize(
    ("task", "reason"), [(Interacting, "would change the gradient"), (Unstackable, "do not stack")]
)
def test_models_that_stacking_would_falsify_run_one_by_one(task: type[SpineTask], reason: str):
    found = training(task()).passes.execution
    assert (found.stack, found.draws_random) == (1, False)
    assert reason in found.reason


def test_batch_norm_over_groups_may_be_stacked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(execution, "_seconds", lambda passes, chunks: len(chunks))  # fewer calls are quicker
    found = training(Plain()).passes.execution
    assert (found.stack, found.draws_random) == (8, False)
    assert training(Plain(), stack=4).passes.execution.stack == 4
    assert training(Plain(), stack=1).passes.execution.stack == 1


def test_what_is_not_quicker_is_not_done(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(execution, "_seconds", lambda passes, chunks: -len(chunks))
    assert training(Plain()).passes.execution.stack == 1


def test_trying_leaves_no_trace():
    tried, untried = training(Plain()), training(Plain(), stack=1)
    for name, value in untried.model.state_dict().items():
        assert torch.equal(tried.model.state_dict()[name], value), name
    assert all(not gradient.any() for gradient in tried.optimizer.flat.gradients)
    first, second = (run.passes.load([0])["id"] for run in (tried, untried))
    assert torch.equal(first, second), "the first micro-batch is still the first"


def test_memory_that_runs_out_halves_the_stack(monkeypatch: pytest.MonkeyPatch):
    original = Passes.rehearse

    def tight(self: Passes, chunks) -> None:
        if any(len(chunk) > 2 for chunk in chunks):
            raise torch.OutOfMemoryError("no room")
        original(self, chunks)

    monkeypatch.setattr(Passes, "rehearse", tight)
    monkeypatch.setattr(execution, "_seconds", lambda passes, chunks: len(chunks))
    assert training(Plain()).passes.execution.stack == 2

"""How passes run is found by trying: stacked only where the gradient stays the same."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.trainer.plans import spec
from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import CLASSES, FEATURES, NoisyTask, Trace, follow, ready, recipe
from trainer.compute import autotune
from trainer.compute.autotune import Execution
from trainer.run_folder import journal
from trainer.training import Training
from trainer.worker import run_worker


class Plain(NoisyTask):
    """No dropout: the forward pass is a function of its micro-batch."""

    def __init__(self):
        super().__init__(dropout=0.0)


class Centred(nn.Module):
    """Takes the mean over its whole input: examples of a forward pass interact."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0))


class Interacting(NoisyTask):
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


class Unstackable(NoisyTask):
    """A model that cannot take two micro-batches at once."""

    def model(self) -> nn.Module:
        return Rigid()


CHOSEN = recipe(run={"reduction": "fast"}, train={"epochs": 5})


def training(task: NoisyTask, state: Any = None, **run: Any) -> Training:
    chosen = recipe(run={"reduction": "fast", "stack": "auto", **run}, train={"epochs": 5})
    return ready(chosen, state, task)


def test_dropout_keeps_micro_batches_apart():
    found = training(NoisyTask()).execution
    assert (found.stack, found.draws_random) == (1, True)
    assert "draws random numbers" in found.reason


@pytest.fixture
def fewer_calls_are_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_seconds", lambda passes, micro_batches, way: -way.stack)


@pytest.mark.parametrize(
    ("task", "reason"),
    [(Interacting, "not stacked: the gradient would change"), (Unstackable, "not stacked: ")],
)
@pytest.mark.usefixtures("fewer_calls_are_quicker")
def test_models_that_stacking_would_falsify_run_one_by_one(task: type[NoisyTask], reason: str):
    found = training(task()).execution
    assert (found.stack, found.draws_random) == (1, False)
    assert reason in found.reason


@pytest.mark.usefixtures("fewer_calls_are_quicker")
def test_batch_norm_over_groups_may_be_stacked():
    found = training(Plain()).execution
    assert (found.stack, found.draws_random) == (8, False)
    assert training(Plain(), stack=4).execution.stack == 4
    assert training(Plain(), stack=1).execution.stack == 1


def test_what_is_not_quicker_is_not_done(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autotune, "_seconds", lambda passes, micro_batches, way: way.stack)
    assert training(Plain()).execution.stack == 1


def test_trying_leaves_no_trace():
    tried, untried = training(Plain()), training(Plain(), stack=1)
    for name, value in untried.model.state_dict().items():
        assert torch.equal(tried.model.state_dict()[name], value), name
    assert all(not gradient.any() for gradient in tried.optimizer.flat.gradients)
    first, second = (run.forward_backward.load([0])["id"] for run in (tried, untried))
    assert torch.equal(first, second), "the first micro-batch is still the first"


def test_what_was_found_is_kept_until_the_recipe_asks_for_something_else():
    first = training(Plain())
    state = first.state()
    kept = replace(first.execution, reason="found before")
    state["execution"] = asdict(kept)
    assert training(Plain(), state=state).execution == kept
    anew = training(Plain(), stack=2, state=state).execution
    assert anew.reason != "found before"
    assert anew.stack <= 2


class Tight(nn.Module):
    """Needs more memory than there is, from some call on, for more than so many examples."""

    def __init__(self, model: nn.Module, most: int, calls: int, when: str, error: type[Exception]):
        super().__init__()
        self.model, self.most, self.calls, self.when, self.error = model, most, calls, when, error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if self.calls > 0 or len(x) <= self.most or not self.training:
            return self.model(x)
        if self.when == "forward":
            self.fail()
        x = x.clone().requires_grad_()  # the last that a backward pass comes to: weights have their gradients
        x.register_hook(lambda gradient: self.fail())
        return self.model(x)

    def fail(self) -> None:
        if self.error is RuntimeError:
            torch.empty(1 << 50)  # as the CPU's allocator says it
        raise torch.OutOfMemoryError("no room")


class TightPlain(Plain):
    """The plain task in little memory."""

    def __init__(self, most: int, calls: int, when: str = "forward", error: type[Exception] = MemoryError):
        super().__init__()
        self.tightness = (most, calls, when, error)

    def model(self) -> nn.Module:
        return Tight(super().model(), *self.tightness)


@pytest.mark.usefixtures("fewer_calls_are_quicker")
@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_memory_that_is_short_while_trying_halves_the_stack(error: type[Exception]):
    assert training(TightPlain(20, 0, error=error)).execution.stack == 2


def stacked_trace(make_task: Callable[[], NoisyTask], stack: int) -> tuple[Trace, Execution]:
    """Train for some steps with a stack that is given; the trace and how passes ran at the end."""
    begun = training(make_task(), stack=1)
    begun.execution = replace(begun.execution, stack=stack)
    kept = Trace([], [], {}, {}, [])
    follow(begun, kept, 12)
    return kept, begun.execution


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_memory_that_runs_out_later_halves_the_stack_of_all_and_spoils_no_step(
    process_group: ProcessGroup, workers: int, when: str
):
    """On one worker earlier than on the other, after others' gradients were sent, and twice in a row."""
    enough = process_group.run(workers, stacked_trace, Plain, 4)
    tight = process_group.run(workers, stacked_trace, functools.partial(TightPlain, 10, 9, when), 4)
    for (kept, before), (again, after) in zip(enough, tight, strict=True):
        assert (before.stack, after.stack) == (4, 1)
        assert "memory ran out at 2 at a time" in after.reason
        np.testing.assert_allclose(again.losses, kept.losses, rtol=1e-5)
        np.testing.assert_allclose(again.norms, kept.norms, rtol=1e-4)


def test_memory_that_is_too_short_for_one_micro_batch_stops_the_run_with_a_cure(
    process_group: ProcessGroup, tmp_path: Path
):
    one_by_one = recipe(run={"reduction": "fast", "stack": 1}, train={"epochs": 5})
    order = spec(one_by_one, tmp_path, functools.partial(TightPlain, 5, 30))
    outcome, *_ = process_group.run(2, run_worker, order)
    assert outcome.status == "FAILED"
    assert "no room; lower batch.micro or set run.recompute" in outcome.reason


@pytest.mark.usefixtures("fewer_calls_are_quicker")
def test_the_journal_tells_how_steps_are_computed_and_when_that_changes(tmp_path: Path):
    run_worker(spec(CHOSEN, tmp_path, functools.partial(TightPlain, 40, 40)))
    lines = [line for line in journal.read(tmp_path) if line["kind"] in ("execution", "step")]
    told = [line for line in lines if line["kind"] == "execution"]
    assert [line["stack"] for line in told] == [8, 4]
    assert told[0] is lines[0]
    assert 1 < told[1]["step"] == lines[lines.index(told[1]) + 1]["step"]


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything of torch.compile but the code that it writes, which takes seconds."""
    original = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, dynamic, options: original(model, dynamic=dynamic, backend="aot_eager"),
    )
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("quick_compiler", "fewer_calls_are_quicker")
@pytest.mark.parametrize("task", [Plain, NoisyTask])
def test_a_compiled_model_learns_the_same_and_is_compiled_for_two_lengths_at_most(task: type[NoisyTask]):
    compiled, as_it_is = (training(task(), stack=3, compile=wanted) for wanted in (True, False))
    assert compiled.execution.compiled
    assert "compiled, the gradient is the same" in compiled.execution.reason
    traces = [Trace([], [], {}, {}, []) for _ in range(2)]
    follow(as_it_is, traces[1], 6)
    follow(compiled, traces[0], 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        follow(compiled, traces[0], 6)
    np.testing.assert_allclose(traces[0].losses, traces[1].losses, rtol=1e-5)
    for name, value in traces[1].tensors.items():
        if "running" in name:
            np.testing.assert_allclose(traces[0].tensors[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_code_that_the_compiler_writes_draws_the_same_random_numbers():
    torch.compiler.reset()
    compiled, as_it_is = (training(NoisyTask(), compile=wanted) for wanted in (True, False))
    assert compiled.execution.compiled
    traces = [Trace([], [], {}, {}, []) for _ in range(2)]
    for one, kept in zip((compiled, as_it_is), traces, strict=True):
        follow(one, kept, 6)
    np.testing.assert_allclose(traces[0].losses, traces[1].losses, rtol=1e-5)


class Miscompiled(nn.Module):
    """Code that computes something else."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.01 * self.model(x)


def no_compiler(*arguments: object, **named: object) -> nn.Module:
    raise RuntimeError("no C++ compiler\nand more about it")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (lambda model, **named: Miscompiled(model), "not compiled: the gradient would change by"),
        (no_compiler, "not compiled: no C++ compiler"),
    ],
)
def test_a_model_that_does_not_compile_runs_as_it_is_and_says_why(
    compiler: Callable[..., nn.Module], reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "compile", compiler)
    found = training(Plain(), compile=True).execution
    assert not found.compiled
    assert reason in found.reason
    assert "more about it" not in found.reason

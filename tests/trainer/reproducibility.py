"""What the tests of reproducibility train: a small task with everything that makes law 1 hard, and a run of
it that keeps all traces.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from data_echo import ArraySource, InlinePreparer
from trainer.build import build
from trainer.distributed.group import WorkerGroup
from trainer.loop import steps
from trainer.plan.inputs import Inputs
from trainer.plan.plan import resolve
from trainer.recipe.schema import Recipe
from trainer.run_folder.checkpoints import Checkpoints, load
from trainer.task import load as load_task
from trainer.training import Training

EXAMPLES, FEATURES, CLASSES = 203, 12, 5  # no round number anywhere: passes end within micro-batches


class NoisyTask:
    """Noisy inputs, a masked loss with unequal counts, batch norm and dropout. `gain` multiplies the loss."""

    def __init__(self, dropout: float = 0.3, gain: float = 1.0):
        self.dropout, self.gain = dropout, gain
        random = np.random.default_rng(7)
        x = random.standard_normal((EXAMPLES, FEATURES)).astype(np.float32)
        y = (x @ random.standard_normal((FEATURES, CLASSES))).argmax(1)
        self.arrays = {
            "x": x,
            "y": y,
            "id": np.arange(EXAMPLES),
            "counts": random.integers(0, 2, EXAMPLES).astype(bool),
        }

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 24, bias=False),  # before a batch norm a bias has no gradient but rounding
            nn.BatchNorm1d(24),
            nn.ReLU(),
            nn.Dropout(self.dropout) if self.dropout else nn.Identity(),
            nn.Linear(24, CLASSES),
        )

    def source(self, split: str) -> ArraySource:
        return ArraySource(self.arrays)

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        return {**example, "x": example["x"] + 0.01 * np.float32(draw.normal())}

    def augment(self, batch: dict[str, Tensor], draw: Any) -> dict[str, Tensor]:
        return {**batch, "x": batch["x"] + 0.1 * draw.normal(FEATURES)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return self.gain * (losses * batch["counts"]).sum(), batch["counts"].sum()

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        right = model(batch["x"]).argmax(1) == batch["y"]
        return {"accuracy": (right.sum(), torch.tensor(len(right)))}


def recipe(**changes: dict[str, Any]) -> Recipe:
    """A short run in exact arithmetic; `changes` replace keys of its sections."""
    sections: dict[str, Any] = {
        "task": {"use": "tests.trainer.reproducibility:NoisyTask"},
        "batch": {"size": 80, "micro": 10, "lanes": 8},
        "optimizer": {"name": "lamb", "lr": 0.02},
        "schedule": {"warmup": {"share": 0.2, "shape": "linear"}, "decay": {"shape": "polynomial"}},
        "echo": {"factor": 2, "capacity": 160},
        "train": {"epochs": 6},
        "run": {"workers": 1, "reduction": "exact", "device": "cpu"},
    }
    for section, keys in changes.items():
        sections[section] = {**sections.get(section, {}), **keys}
    return Recipe.model_validate({"name": "noisy", "seed": 3, **sections})


@dataclasses.dataclass
class Trace:
    """Everything that a run must share with the same recipe on other workers."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, np.ndarray]  # weights, batch-norm buffers, optimizer state and all other numbers of it
    served: dict[int, list[int]]  # example ids of this worker's micro-batches
    gradients: list[np.ndarray]  # of the first step, per parameter

    def bits(self) -> dict[str, bytes]:
        """Weights, buffers and state, to be compared bit for bit."""
        return {name: tensor.tobytes() for name, tensor in self.tensors.items()}


def trace(chosen: Recipe, sabotage: str | None = None, most_steps: int | None = None) -> Trace:
    """Train as a member of this process's group and keep what happened."""
    training = ready(chosen)
    served = _listen(training)
    if sabotage:
        _sabotage(training, sabotage)
    kept = Trace([], [], {}, served, [])
    follow(training, kept, most_steps)
    return kept


def leg(chosen: Recipe, folder: str, until: int) -> Trace:
    """Go on from the newest checkpoint in `folder`, train until a step, and leave a checkpoint there."""
    store = Checkpoints(Path(folder), keep=1)
    newest = store.newest_whole()
    training = ready(chosen, None if newest is None else load(newest))
    kept = Trace([], [], {}, _listen(training), [])
    follow(training, kept, until)
    if training.group.size > 1:
        dist.barrier()  # all have read the old checkpoint
    state = training.state()  # of all workers, where each has a part
    if training.group.rank == 0:
        store.save(training.progress.step, state)
        store.wait()
    return kept


def ready(chosen: Recipe, state: Any = None, task: NoisyTask | None = None) -> Training:
    """A worker of this process's group, ready to train the noisy task, or another of its kind."""
    task, group = task or load_task(chosen.task), WorkerGroup.join("cpu")
    return build(
        resolve(chosen, Inputs.of(chosen, task)), task, group, InlinePreparer(task, chosen.seed), state
    )


def follow(training: Training, kept: Trace, until: int | None) -> None:
    """Train until a step, adding to a trace."""
    for step in steps(training) if until is None or training.progress.step < until else ():
        if step.step == 1:
            gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
            whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
            kept.gradients = [g.numpy().copy() for g in whole]
        kept.losses.append(step.loss)
        kept.norms.append(step.gradient_norm)
        if step.step == until:
            break
    kept.tensors = dict(_tensors({**training.state(), "execution": None}))  # how, and how fast


def _listen(training: Training) -> dict[int, list[int]]:
    served: dict[int, list[int]] = {}
    backward = training.forward_backward.backward

    def listening(
        micro_batches: list[int], batch: dict[str, Tensor], execution: Any, weight: float = 1.0
    ) -> Tensor:
        for j, ids in zip(micro_batches, batch["id"].chunk(len(micro_batches)), strict=True):
            if weight:
                served[j] = ids.tolist()
        return backward(micro_batches, batch, execution, weight)

    training.forward_backward.backward = listening  # type: ignore[method-assign]
    return served


def _sabotage(training: Training, how: str) -> None:
    """Break law 1 as a bug would: the test must notice."""
    passes = training.forward_backward
    if how == "dropout keyed by rank":
        passes.seed += training.group.rank
    if how == "one wrong example":
        load = passes.load

        def loading(micro_batches: list[int]) -> dict[str, Tensor]:
            batch = load(micro_batches)
            if training.group.rank == 1 and training.progress.step == 3:
                batch = {**batch, "x": torch.cat([batch["x"][:1] * 0, batch["x"][1:]])}
            return batch

        passes.load = loading  # type: ignore[method-assign]


def _tensors(state: Any, name: str = "") -> Any:
    if isinstance(state, Tensor):
        yield name, state.detach().numpy().copy()
    elif isinstance(state, int | float):
        yield name, np.array(state)
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name}/{key}")

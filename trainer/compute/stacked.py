"""Several trainings of one model's shape as one tensor program: a step of all costs little more than of one.

Parameters of all of them lie in the flat buffers of one optimizer, to which each training is more parameter
groups: a layer's norms, rates and statistics stay its own. The forward pass is the model's, mapped over the
stacked parameters (`torch.vmap`), and its backward pass is autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import optim
from data_echo import generators
from trainer.compute.precision import SAME_GRADIENT
from trainer.task import Task
from trainer.task_calls import unchecked

Batch = dict[str, Tensor]
Sums = tuple[Tensor, Tensor]  # of each training, and what to divide it by: [trainings]
EXAMPLES_TOGETHER = 4096  # in one pass, of all trainings; caches lose more than fewer calls save beyond it


class NotStackable(Exception):  # noqa: N818
    """These trainings cannot be one tensor program; the text says why."""


class StackedModels:
    """K models of one shape and their optimizer.

    Args:
        task: gives losses and metrics.
        models: with the weights that each training starts from.
        groups: the parameter groups of each model with all their options, alike in all of them.
        optimizer: its name.

    Raises:
        NotStackable: they hold what cannot be mapped over.
    """

    def __init__(
        self,
        task: Task,
        models: Sequence[nn.Module],
        groups: Sequence[list[dict[str, Any]]],
        optimizer: str,
    ) -> None:
        self.task, self._plain, self.size = task, unchecked(task), len(models)
        self._model = models[0]
        if next(self._model.buffers(), None) is not None:
            raise NotStackable("the model has buffers, which a forward pass may move")
        # Alike groups of all models lie next to each other: the optimizer takes them in one call.
        self.optimizer = optim.build(optimizer, list(chain(*zip(*groups, strict=True))), flatten=True)
        self.optimizer.zero_grad()  # from here on gradients lie in the flat buffers
        self._trained: list[Tensor] = []  # each trained parameter of all models, [K, ...]: views of the
        self._gradients: list[Tensor] = []  # flat buffers, and so are their gradients
        self._parameters = self._stacked(models)

    def backward(self, batch: Batch) -> Sums:
        """Add up the gradients of the summed losses over a batch, tensors [K, examples, ...]; returns the
        losses' sums and counts, [K].

        Raises:
            NotStackable: the task's loss cannot be mapped over.
        """
        examples = next(iter(batch.values())).shape[1]
        most = max(1, EXAMPLES_TOGETHER // self.size)
        losses = counts = torch.zeros(self.size)
        for start in range(0, examples, most):
            part = {key: value[:, start : start + most] for key, value in batch.items()}
            loss, count = self._mapped(self._loss, (0, 0), part)
            for home, gradient in zip(
                self._gradients, torch.autograd.grad(loss.sum(), self._trained), strict=True
            ):
                home += gradient
            losses, counts = losses + loss.detach(), counts + count
        return losses, counts

    @torch.no_grad()
    def update(self, sums: Sums, rates: Sequence[float], clip_norm: float | None) -> Tensor:
        """One optimizer step at each training's mean gradient; whether its loss and gradient are finite, bool
        [K]. One that is not stays where it is.
        """
        losses, counts = sums
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in self._gradients]).sum(0)
        norms = squares.sqrt() / counts
        factors = 1 / counts
        if clip_norm is not None:
            factors *= (clip_norm / norms).clamp(max=1)
        finite = losses.isfinite() & norms.isfinite()
        for gradient in self._gradients:
            gradient *= factors.view(-1, *[1] * (gradient.dim() - 1))
            if not finite.all():
                gradient[~finite] = 0
        for place, group in enumerate(self.optimizer.param_groups):
            group["lr"] = rates[place % self.size] * group.get("lr_multiplier", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return finite

    @torch.no_grad()
    def metrics(self, batch: Batch) -> dict[str, Sums]:
        """Sums and counts of the task's metrics, [K] each, over a batch that all share, [examples, ...]."""
        self._model.eval()
        try:
            return self._mapped(self._metrics, (0, None), batch)
        finally:
            self._model.train()

    def differs(self, models: Sequence[nn.Module], batch: Batch) -> str | None:
        """Why the stacked gradient is not that of each model alone; None where it is, to rounding.

        Args:
            models: those of the constructor.
            batch: [K, examples, ...].
        """
        self.optimizer.zero_grad()
        self.backward(batch)
        names = [name for name, value in self._parameters.items() if value.requires_grad]
        stacked = dict(zip(names, [gradient.clone() for gradient in self._gradients], strict=True))
        self.optimizer.zero_grad()
        for k, model in enumerate(models):
            before = generators.state()
            loss, _ = self.task.loss(model, {key: value[k] for key, value in batch.items()})
            if generators.state() != before:
                return "its forward pass draws random numbers"
            loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    error = (parameter.grad - stacked[name][k]).norm()
                    if not error <= SAME_GRADIENT["fp32"] * stacked[name][k].norm() + 1e-30:
                        return f"stacked, the gradient of {name} is another one"
        self.optimizer.zero_grad()
        return None

    def _loss(self, parameters: Batch, batch: Batch) -> Sums:
        total, count = self._plain.loss(self._with(parameters), batch)
        return total, torch.as_tensor(count, dtype=torch.float32)

    def _metrics(self, parameters: Batch, batch: Batch) -> dict[str, Sums]:
        model = self._with(parameters)
        metrics = self.task.metrics(model, batch)
        if "loss" not in metrics:
            metrics = {"loss": self.task.loss(model, batch), **metrics}
        return {
            name: (total.double(), torch.as_tensor(count).double())
            for name, (total, count) in metrics.items()
        }

    def _with(self, parameters: Batch) -> Any:
        """The model as a function, with these parameters."""
        return lambda *inputs, **named: functional_call(self._model, parameters, inputs, named)

    def _mapped(self, function: Any, dims: tuple[int, int | None], batch: Batch) -> Any:
        try:
            return torch.vmap(function, in_dims=dims)(self._parameters, batch)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NotStackable(f"it cannot be mapped over ({reason})") from error

    def _stacked(self, models: Sequence[nn.Module]) -> Batch:
        """Each parameter of all models by name, [K, ...]."""
        flat = self.optimizer.flat
        if len(flat.parameters) != 1:
            raise NotStackable("the parameters are of several dtypes")
        named = [dict(model.named_parameters()) for model in models]
        stacked = {}
        for name, first in named[0].items():
            if not first.requires_grad:
                stacked[name] = torch.stack([each[name].detach() for each in named])
                continue
            starts = [flat.place(each[name])[1] for each in named]
            apart = starts[1] - starts[0] if self.size > 1 else 1
            assert starts == [starts[0] + k * apart for k in range(self.size)]
            shape, strides = (self.size, *first.shape), (apart, *first.stride())
            view = flat.parameters[0].as_strided(shape, strides, starts[0])
            stacked[name] = view.detach().requires_grad_()
            self._trained.append(stacked[name])
            self._gradients.append(flat.gradients[0].as_strided(shape, strides, starts[0]))
        return stacked

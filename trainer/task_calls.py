"""Calls of the user's task: what one raises or wrongly returns is told with the user's own file and line.

The checks look at types, shapes and dtypes only, so that they never wait for a GPU.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from data_echo.errors import relative, users_line
from trainer.errors import TaskError, with_advice

if TYPE_CHECKING:
    from torch import Tensor, nn

    from data_echo import Draws, Source

Halves = tuple[str, str]  # what is wrong, what would be right
MOST_EXAMPLES = 10**12
PAIR = "a sum and a count, each a number or a tensor of one element"


def checked(task: Any) -> Any:
    """The task with all of its calls checked; any other attribute is the task's own."""
    return task if isinstance(task, CheckedTask) else CheckedTask(task)


def unchecked(task: Any) -> Any:
    """The task as the user wrote it, for calls that see no plain tensors."""
    return task._task if isinstance(task, CheckedTask) else task


class CheckedTask:
    """A task whose six methods raise TaskError for whatever goes wrong in them, except for lack of memory."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled it has no task yet
            raise AttributeError(name)
        return getattr(self._task, name)

    def model(self) -> nn.Module:
        """See `Task.model`: real parameters, all of known shape."""
        model = self._called("model")
        self._refuse("model", _of_a_model(model))
        return model

    def source(self, split: str) -> Source:
        """See `Task.source`: something with a length and rows by number."""
        source = self._called("source", split)
        self._refuse("source", _of_a_source(source), repr(split))
        try:
            length = len(source)
        except Exception as error:
            raise self._raised("source", error, f"{split!r}), len(") from error
        if length > MOST_EXAMPLES:
            self._refuse("source", (f"has a length of {length}", f"at most {MOST_EXAMPLES}"), repr(split))
        return source

    def prepare(self, example: Any, draw: Any) -> dict[str, Any]:
        """See `Task.prepare`: names and numbers."""
        prepared = self._called("prepare", example, draw)
        self._refuse("prepare", _of_prepared(prepared))
        return prepared

    def augment(self, batch: dict[str, Tensor], draw: Draws) -> dict[str, Tensor]:
        """See `Task.augment`: names and tensors, example first."""
        augmented = self._called("augment", batch, draw)
        self._refuse("augment", _of_a_batch(augmented))
        return augmented

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See `Task.loss`: a sum that parameters lead to, and a count."""
        loss = self._called("loss", model, batch)
        self._refuse("loss", _of_a_loss(loss))
        return loss

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """See `Task.metrics`: by name, a sum and a count."""
        metrics = self._called("metrics", model, batch)
        self._refuse("metrics", _of_metrics(metrics))
        return {name: (_scalar(total), _scalar(count)) for name, (total, count) in metrics.items()}

    def _called(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._task, method)(*arguments)
        except (Exception, SystemExit) as error:
            if _is_out_of_memory(error):
                raise
            told = repr(arguments[0]) if method == "source" else ""
            raise self._raised(method, error, told) from error

    def _raised(self, method: str, error: BaseException, told: str = "") -> TaskError:
        place = users_line(error, self._files()) or self._definition(method)
        wrong, right = with_advice(error, "fix the task")
        wrong = next(iter(wrong.splitlines()), "")[:1000]
        text = f"{type(error).__name__}: {wrong}" if wrong else type(error).__name__
        trace = "".join(traceback.format_exception(error))
        return TaskError(f"{self._named(method, told)} raised {text}{_in_brackets(place)}", right, trace)

    def _refuse(self, method: str, halves: Halves | None, told: str = "") -> None:
        if halves is not None:
            wrong, right = halves
            place = _in_brackets(self._definition(method))
            raise TaskError(f"{self._named(method, told)} {wrong}{place}", f"it should {right}")

    def _named(self, method: str, told: str) -> str:
        return f"{method}({told}) of {type(self._task).__qualname__}"

    def _definition(self, method: str) -> str:
        """`file:line` where a method begins; empty where Python does not know."""
        code = getattr(inspect.unwrap(getattr(self._task, method, self._task)), "__code__", None)
        return "" if code is None else f"{relative(code.co_filename)}:{code.co_firstlineno}"

    def _files(self) -> set[str]:
        modules = (sys.modules.get(kind.__module__) for kind in type(self._task).__mro__)
        return {file for module in modules if (file := getattr(module, "__file__", None))}


def _of_a_model(model: Any) -> Halves | None:
    from torch import nn
    from torch.nn.parameter import is_lazy

    if not isinstance(model, nn.Module):
        return f"returned {described(model)}", "return a torch.nn.Module"
    named = list(model.named_parameters())
    if not named:
        return "returned a model without parameters", "return one that can be trained"
    for name, parameter in [*named, *model.named_buffers()]:
        if is_lazy(parameter):
            right = "give its layer the number of inputs, instead of a lazy one"
            return f"returned a model whose {name} has no shape yet", right
    for name, parameter in named:
        if parameter.is_complex():
            right = "have real parameters: keep the real and the imaginary part as two"
            return f"returned a model whose {name} is {_dtype(parameter)}", right
    return None


def _of_a_source(source: Any) -> Halves | None:
    has_rows = all(hasattr(type(source), name) for name in ("__len__", "__getitem__"))
    if not has_rows or isinstance(source, Mapping | str | bytes | type):
        return f"returned {described(source)}", "return an object with len(source) and source[number]"
    return None


def _of_prepared(prepared: Any) -> Halves | None:
    right = "return a dict of arrays or numbers by name"
    if not isinstance(prepared, dict) or not prepared:
        return f"returned {described(prepared)}", right
    for name, value in prepared.items():
        if not isinstance(name, str):
            return f"returned a dict with the key {name!r}", right
        if _kind(value) not in "biufc":
            return f"returned {described(value)} as {name!r}", right
    return None


def _kind(value: Any) -> str:
    """NumPy's letter for the kind of a value's numbers; O for anything else."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind
    if isinstance(value, int | float):
        return "f"
    try:
        return np.asarray(value).dtype.kind
    except Exception:  # of ragged lists, tensors on a device
        return "O"


def _of_a_batch(batch: Any) -> Halves | None:
    from torch import Tensor

    right = "return a dict of tensors by name, example first"
    if not isinstance(batch, dict) or not batch:
        return f"returned {described(batch)}", right
    for name, value in batch.items():
        if not isinstance(value, Tensor) or not value.dim():
            return f"returned {described(value)} as {name!r}", right
    return None


def _of_a_loss(loss: Any) -> Halves | None:
    import torch

    if problem := _of_a_pair(loss):
        return f"returned {problem}", f"return {PAIR}"
    total = loss[0]
    if not isinstance(total, torch.Tensor) or not total.is_floating_point():
        return f"returned {described(total)} as its sum", "return a floating-point tensor of one element"
    if torch.is_grad_enabled() and not total.requires_grad:
        right = "compute it from the model's output, without .item(), .detach() or torch.no_grad()"
        return "returned a sum without a gradient: no parameter leads to it", right
    return None


def _of_metrics(metrics: Any) -> Halves | None:
    right = f"return a dict: for each name {PAIR}"
    if not isinstance(metrics, dict):
        return f"returned {described(metrics)}", right
    for name, pair in metrics.items():
        if not isinstance(name, str) or not name:
            return f"returned a dict with the key {name!r}", right
        if problem := _of_a_pair(pair):
            return f"returned {problem} as {name!r}", right
    return None


def _of_a_pair(pair: Any) -> str | None:
    """What is wrong with a sum and a count, in words."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return described(pair)
    wrong = [value for value in pair if not _is_scalar(value)]
    return f"({', '.join(map(described, pair))})" if wrong else None


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int | float):
        return True
    if isinstance(value, np.ndarray | np.generic):
        return value.size == 1 and value.dtype.kind in "biuf"
    return hasattr(value, "is_complex") and value.numel() == 1 and not value.is_complex()


def _scalar(value: Any) -> Any:
    """A sum or a count without dimensions."""
    return value.reshape(()) if getattr(value, "ndim", 0) else value


def described(value: Any) -> str:
    """What a value is, in words that tell a shape or a length from a type."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}, not an instance"
    name = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{_dtype(value)} {list(value.shape)}"
    if isinstance(value, dict) and value:
        return f"a dict of {', '.join(map(repr, _few(value)))}"
    if isinstance(value, tuple | list | dict | set):
        return f"a {name} of {len(value)}"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def shapes(batch: Mapping[str, Any]) -> str:
    """The names, dtypes and shapes of arrays or tensors."""
    return ", ".join(f"{name} {described(value)}" for name, value in batch.items())


def _few(values: Mapping[Any, Any]) -> Iterator[Any]:
    yield from list(values)[:6]


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _in_brackets(place: str) -> str:
    return f" ({place})" if place else ""


def _is_out_of_memory(error: BaseException) -> bool:
    """By name: the pool's processes work without torch."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)

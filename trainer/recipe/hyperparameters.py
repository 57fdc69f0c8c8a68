"""The keys of the recipe's `optimizer` section that belong to the rule itself, checked against `optim`."""

from collections.abc import Iterator
from typing import Any

from trainer.recipe.durations import LARGEST
from trainer.recipe.messages import nearest, plain
from trainer.recipe.schema import Contradiction, OptimizerSection

Hyper = dict[str, Any]


def published(name: str) -> Hyper:
    """The rule's hyperparameters, published defaults in YAML's types; nothing for an unknown rule."""
    import optim  # brings torch

    if name not in optim.names():
        return {}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in optim.hyperparameters(name).items()}


def contradictions(section: Hyper) -> Iterator[Contradiction]:
    """Unknown names, values of the wrong kind, and values that the rule itself refuses."""
    import optim

    name = section["name"]
    if name not in optim.names():
        yield "optimizer.name", f"is {plain(name)}, an unknown optimizer", nearest(name, optim.names())
        return
    defaults = published(name)
    if section.get("lr") is None and defaults["lr"] is None:
        own = "; or `lr: 1` with `relative_step: true`, its published schedule, which the recipe's multiplies"
        yield (
            "optimizer.lr",
            "is missing",
            f"{name} has no published rate that a schedule could follow; give one"
            + (own if "relative_step" in defaults else ""),
        )
    for key, value in section.items():
        if key in defaults:
            yield from _value_contradictions(name, key, value, defaults)
        elif key not in OptimizerSection.model_fields:
            yield f"optimizer.{key}", f"is unknown to {name}", nearest(key, defaults)


def _value_contradictions(name: str, key: str, value: Any, defaults: Hyper) -> Iterator[Contradiction]:
    if key == "lr":  # checked with the section
        return
    if not _is_bounded(value):
        yield f"optimizer.{key}", f"is {plain(value)}", f"give numbers from {-LARGEST:g} to {LARGEST:g}"
        return
    if not _same_kind(value, defaults[key]):
        right = f"give a value such as {plain(defaults[key])}, the published one"
        yield f"optimizer.{key}", f"is {plain(value)}", right
        return
    if value == defaults[key]:  # spares most recipes the second that making a first optimizer takes
        return
    import torch

    import optim

    hyper = OptimizerSection.model_validate({"name": name} | defaults | {key: value}).hyper
    try:
        optim.build(name, [torch.nn.Parameter(torch.zeros(1))], **hyper)
    except (ValueError, TypeError) as error:
        yield (
            f"optimizer.{key}",
            f"is {plain(value)} ({error})",
            f"the published value is {plain(defaults[key])}",
        )


def _is_bounded(value: object) -> bool:
    """Whether no number of a value could leave the range of what is computed with it."""
    if isinstance(value, list):
        return all(map(_is_bounded, value))
    return not isinstance(value, int | float) or abs(value) <= LARGEST


def _same_kind(value: object, default: object) -> bool:
    """Whether a value has the form of the published one; a published null says nothing of the form."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float)
    if isinstance(default, list):
        return isinstance(value, list) and len(value) == len(default) and all(map(_same_kind, value, default))
    return isinstance(value, type(default))

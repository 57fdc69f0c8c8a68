"""From a recipe to the same training at another global batch: what follows the batch, and by which rule.

Pure functions of the recipe's values. What is computed, not trained, has one fixed rule: a micro-batch has
the most examples that divide the batch and are no more than the recipe's micro-batch, and so has a group of
batch norm within it; lanes stay; a group has as many of the recipe's workers as the batch has work for.
What is trained follows the rules of `carry`, whose names are those of `RULES`.

Sources: half-lives of averages in tokens, Marek et al. 2025 (arXiv:2507.07101) and Malladi et al. 2022
(arXiv:2205.10287); weight decay with the batch at fixed model and data, Bergsma et al. 2025
(arXiv:2505.13738); linear rate and warm-up, Goyal et al. 2017 (arXiv:1706.02677); the square root, Hoffer et
al. 2017 (arXiv:1705.08741).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from trainer.recipe.batch import divisors

Values = dict[str, Any]  # a recipe's, as plain nested dicts

_POWERS = {"fixed": 0.0, "sqrt": 0.5, "linear": 1.0}  # of the ratio of batches, as a factor
_HALF_LIFE = ("steps", "tokens")  # in which an average's half-life stays
RULES: dict[str, tuple[str, ...]] = {
    "lr": tuple(_POWERS),
    "beta1": _HALF_LIFE,
    "beta2": _HALF_LIFE,
    "momentum": _HALF_LIFE,
    "weight_decay": tuple(_POWERS),
    "warmup": ("examples", "steps"),
}
"""What can follow the batch: the names of each one's rules."""


class Change(NamedTuple):
    """What one rule does to one key."""

    key: str
    before: Any
    after: Any
    rule: str

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} becomes {_shown(self.after)} ({self.rule})"


def carried(values: Values, batch: int, carry: Mapping[str, str]) -> tuple[Values, list[Change]]:
    """A recipe's values at another global batch, and what changed.

    Args:
        values: of a recipe without growth of the batch.
        carry: rules by name, a part of `RULES`; what the recipe does not have is left out.
    """
    result = deepcopy(values)
    before = values["batch"]["size"]
    changes = [*_computed(result, batch)]
    for name, rule in carry.items():
        if has(result, name):
            changes += _CARRIED[name](result, batch / before, name, rule)
    return result, [change for change in changes if change.before != change.after]


def has(values: Values, name: str) -> bool:
    """Whether a recipe has what one of `RULES` is for."""
    betas = values["optimizer"].get("betas") or ()
    match name:
        case "beta1" | "beta2":
            return len(betas) > int(name == "beta2") and betas[int(name == "beta2")] is not None
        case "warmup":
            return bool(values["schedule"].get("warmup"))
    return isinstance(values["optimizer"].get(name), int | float)


def _computed(values: Values, size: int) -> Iterator[Change]:
    batch = values["batch"]
    yield _set(batch, "batch", "size", size, "asked for")
    yield _set(batch, "batch", "micro", _largest(size, batch["micro"]), "divides the batch")
    if batch.get("bn_group"):
        group = _largest(batch["micro"], batch["bn_group"])
        yield _set(batch, "batch", "bn_group", group, "divides the micro-batch")
    run, most = values["run"], min(size // batch["micro"], batch["lanes"])
    workers = run["workers"]
    if isinstance(workers, dict):
        fewer: Any = {name: min(number, most) for name, number in workers.items()}
    else:
        fewer = min(workers, most)
    yield _set(run, "run", "workers", fewer, "each has a micro-batch")


def _rate(values: Values, ratio: float, name: str, rule: str) -> Iterator[Change]:
    optimizer = values["optimizer"]
    yield _set(optimizer, "optimizer", "lr", optimizer["lr"] * ratio ** _POWERS[rule], rule)


def _average(values: Values, ratio: float, name: str, rule: str) -> Iterator[Change]:
    """A coefficient of an average over steps: β, which keeps β^ratio of what it has over ratio steps."""
    optimizer = values["optimizer"]
    power = ratio if rule == "tokens" else 1.0
    if name == "momentum":
        yield _set(optimizer, "optimizer", "momentum", optimizer["momentum"] ** power, rule)
        return
    betas, place = list(optimizer["betas"]), int(name == "beta2")
    betas[place] **= power
    yield _set(optimizer, "optimizer", "betas", betas, f"{name}: {rule}")


def _decay(values: Values, ratio: float, name: str, rule: str) -> Iterator[Change]:
    optimizer = values["optimizer"]
    value = optimizer["weight_decay"] * ratio ** _POWERS[rule]
    yield _set(optimizer, "optimizer", "weight_decay", value, rule)


def _warmup(values: Values, ratio: float, name: str, rule: str) -> Iterator[Change]:
    """A warm-up in steps serves other examples at another batch; the other units are examples already."""
    warmup = values["schedule"]["warmup"]
    unit = next(unit for unit in ("examples", "epochs", "steps", "share") if warmup.get(unit) is not None)
    if (unit == "steps") == (rule == "steps"):
        return
    factor = 1 / ratio if rule == "examples" else ratio
    value = warmup[unit] * factor
    if unit in ("examples", "steps"):
        value = max(1, round(value))
    yield _set(warmup, "schedule.warmup", unit, value, f"as many {rule}")


_CARRIED: dict[str, Callable[[Values, float, str, str], Iterator[Change]]] = {
    "lr": _rate,
    "beta1": _average,
    "beta2": _average,
    "momentum": _average,
    "weight_decay": _decay,
    "warmup": _warmup,
}


def _set(section: Values, name: str, key: str, value: Any, rule: str) -> Change:
    before, section[key] = section[key], value
    return Change(f"{name}.{key}", before, value, rule)


def _largest(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return max(divisor for divisor in divisors(number) if divisor <= most)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)

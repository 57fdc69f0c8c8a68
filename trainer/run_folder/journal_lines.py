"""Which fields the lines of a journal have, so that whoever reads one can rely on them.

A file may have been damaged, edited, or written by another version: a line that lacks what its kind needs is
no line, and what only newer versions write has a default here.
"""

import math
from collections.abc import Callable
from typing import Any

LATEST = 1e11  # seconds; a later time cannot be shown
Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _any(value: Any) -> bool:
    return True


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _interval(value: Any) -> bool:
    names = ("batch", "low", "median", "high", "level")
    return isinstance(value, dict) and set(value) == set(names) and all(map(_number, value.values()))


def _time(value: Any) -> bool:
    return _number(value) and math.isfinite(value) and 0 <= value <= LATEST


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _positive(value: Any) -> bool:
    return _number(value) and math.isfinite(value) and value > 0


def _positive_or_none(value: Any) -> bool:
    return value is None or _positive(value)


def _curve(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(point, list) and len(point) == 2 and _count(point[0]) and _number(point[1])
        for point in value
    )


def _target(value: Any) -> bool:
    return (
        _table(value)
        and _text(value.get("metric"))
        and (_number(value.get("at_most")) != _number(value.get("at_least")))
    )


def _recipes(value: Any) -> bool:
    return _table(value) and all(
        _table(recipe) and _table(recipe.get("track", {})) for recipe in value.values()
    )


def _axes(value: Any) -> bool:
    return _table(value) and not any(isinstance(each, list | dict) for each in value.values())


_CELL: dict[str, Check] = {"arm": _text, "batch": _count, "axes": _axes}
FIELDS: dict[str, dict[str, Check]] = {
    "stage": {"name": _text, "seconds": _number},
    "accepted": {"changes": _texts},
    "rewind": {"step": _count},
    "restart": {"reason": _text},
    "resized": {"workers": _count, "reason": _text},
    "step": {
        "step": _count,
        "examples": _count,
        "fresh": _number,
        "loss": _number,
        "learning_rate": _number,
    },
    "evaluation": {"split": _text, "step": _count, "examples": _count, "metrics": _table},
    "checkpoint": {"step": _count},
    "decision": {"position": _count, "what": _text, "value": _any},
    "execution": {"reason": _text},
    "target": {"step": _count, "examples": _count, "seconds": _number},
    "sweep": {
        "name": _text,
        "target": _target,
        "arms": _texts,
        "batches": lambda value: isinstance(value, list) and all(map(_count, value)),
    },
    "trial": _CELL
    | {
        "key": _text,
        "rate": _positive,
        "seed": _count,
        "stage": lambda value: value in ("search", "report"),
        "end": _text,
        "steps": _positive_or_none,
        "trained_steps": _count,
        "examples": _count,
        "seconds": _time,
        "curve": _curve,
    },
    "best": _CELL | {"rate": _positive_or_none},
    "fit": {"arm": _text, "axes": _axes, "metrics": _table},
    "end": {"status": lambda value: value in ("FINISHED", "FAILED", "KILLED")},
    "forecast": {
        "id": _text,
        "run": _text,
        "arm": _text,
        "batch": _count,
        "axes": _table,
        "rate": _number,
        "steps": _interval,
        "seconds": lambda value: value is None or _interval(value),
    },
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "step": {"echo": {}, "batch": 0, "step_s": 0.0},
    "end": {"reason": None, "metrics": {}},
}
_OPTIONAL: dict[str, dict[str, Check]] = {
    "sweep": {"recipes": _recipes},
    "trial": {"test": _table, "noise_scale": lambda value: value is None or _number(value)},
    "step": {"echo": _table, "batch": _number, "step_s": _number},
    "end": {"metrics": _table, "reason": lambda value: value is None or _text(value)},
}


def wrong_with(line: Any) -> str | None:
    """What makes an object no line of a journal; None where nothing does."""
    if not isinstance(line, dict):
        return "is no object"
    if not _text(line.get("kind")):
        return "has no kind"
    if not _time(line.get("time")):
        return "has no time"
    kind = line["kind"]
    needed = FIELDS.get(kind, {})
    given = {name: check for name, check in _OPTIONAL.get(kind, {}).items() if name in line}
    for name, check in (needed | given).items():
        if name not in line:
            return f"is of kind {kind} and has no {name}"
        if not check(line[name]):
            return f"is of kind {kind}, and its {name} is {line[name]!r:.40}"
    return None


def completed(line: dict[str, Any]) -> dict[str, Any]:
    """A line with its kind's defaults, and with those of its metrics that are numbers."""
    whole = DEFAULTS.get(line["kind"], {}) | line
    if line["kind"] in ("evaluation", "fit", "end"):
        whole["metrics"] = {name: value for name, value in whole["metrics"].items() if _number(value)}
    return whole

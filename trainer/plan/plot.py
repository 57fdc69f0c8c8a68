"""Learning rate and batch over a run, drawn with characters: `lockstep check --plot`."""

from collections.abc import Sequence
from typing import NamedTuple

from trainer.plan.plan import Plan
from trainer.plan.schedules import LearningRate

EIGHTHS = " ▁▂▃▄▅▆▇█"


class Point(NamedTuple):
    """What a step would use that began after `served` examples."""

    served: int
    learning_rate: float
    batch_size: int


def points(plan: Plan, count: int) -> list[Point]:
    """`count` points of the run, evenly spaced from its first example on; also for other plots."""
    rate = LearningRate(plan.recipe, plan.examples["train"], plan.total_examples)
    curve = []
    for number in range(count):
        served = plan.total_examples * number // count
        batch_size = plan.stages.at(served).batch_size
        curve.append(Point(served, rate.rate(served, batch_size), batch_size))
    return curve


def lines(plan: Plan, width: int = 80, height: int = 8) -> list[str]:
    """The learning rate, and the batch where it grows, as lines of at most `width` characters."""
    margin = 10
    curve = points(plan, width - margin - 1)
    panels = [("learning rate", [point.learning_rate for point in curve], ".3g")]
    if len(plan.stages.stages) > 1:
        panels.append(("batch", [float(point.batch_size) for point in curve], ",.0f"))
    drawn = []
    for title, values, form in panels:
        bars = _bars(values, height)
        labels = [f"{max(values):{form}}", *[""] * (height - 2), "0"]
        drawn += [
            title,
            *(f"{label:>{margin}} {bar}".rstrip() for label, bar in zip(labels, bars, strict=True)),
        ]
    end = f"{plan.total_examples:,} examples"
    return [*drawn, f"{'':{margin}} 0{end:>{width - margin - 2}}"]


def _bars(values: Sequence[float], height: int) -> list[str]:
    """One column per value, as high as its fraction of the largest; the top row first."""
    largest = max(values) or 1.0
    eighths = [round(value / largest * 8 * height) for value in values]
    rows = range(height - 1, -1, -1)
    return ["".join(EIGHTHS[min(8, max(0, high - 8 * row))] for high in eighths) for row in rows]

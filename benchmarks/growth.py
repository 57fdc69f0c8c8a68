"""Growing the batch instead of lowering the rate (Smith et al. 2018, arXiv:1711.00489).

    python benchmarks/growth.py [--keep FOLDER] [--seeds 2 --rates 3]

Noisy one-dimensional signals (`Signals` in benchmarks/tasks.py), 24 epochs, momentum, weight decay 5e-4. At
epochs 12 and 18 the rate is divided by 5, or the batch of 32 multiplied by 5, or neither; the last arm
starts with a batch and rates four times as large, too. Every arm is tuned with as many trials.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from trials import Arm, Bar, Trials, Tuned, check_bars, draw, middle, options, percent, table

RATES = (0.0125, 0.025, 0.05, 0.1, 0.2)
MILESTONES = [{"share": 0.5}, {"share": 0.75}]
DECAY = {"decay": {"shape": "step", "at": MILESTONES, "factor": 0.2}}
GROWTH = {"shape": "multiply", "at": MILESTONES, "factor": 5}
CONSTANT, FALLING, GROWING, LARGER = "constant", "rate ÷ 5", "batch × 5", "batch × 5, from 128"


def arms(epochs: int, rates: int) -> list[Arm]:
    """The four ways."""
    tried = middle(RATES, rates)

    def arm(name: str, size: int = 32, growth: Any = None, schedule: Any = None) -> Arm:
        values = {
            "name": "growth",
            "task": {"use": "tasks:Signals"},
            "batch": {"size": size, "micro": 32, "lanes": 8, "growth": growth},
            "optimizer": {"name": "momentum", "momentum": 0.9, "weight_decay": 5e-4},
            "schedule": {"scale": {"rule": "linear", "base_batch": 32}, **(schedule or {})},
            "train": {"epochs": epochs},
        }
        return Arm(name, values, tried)

    return [
        arm(CONSTANT),
        arm(FALLING, schedule=DECAY),
        arm(GROWING, growth=GROWTH),
        arm(LARGER, size=128, growth=GROWTH),
    ]


def show(found: dict[str, Tuned]) -> None:
    """The table."""
    head = ["schedule", "updates", "rates tried", "best rate at 32", "test accuracy, %", "test loss"]
    table(
        head,
        [
            [
                name,
                tuned.results[0].steps,
                len(tuned.tried),
                f"{tuned.rate:g}{' (edge)' if tuned.edge else ''}",
                percent(tuned.test("accuracy")),
                f"{tuned.mean('loss'):.3f}",
            ]
            for name, tuned in found.items()
        ],
    )


def bars(found: dict[str, Tuned]) -> list[Bar]:
    """What the arms are held against."""
    accuracy = {name: 100 * tuned.mean("accuracy") for name, tuned in found.items()}
    updates = {name: tuned.results[0].steps for name, tuned in found.items()}
    return [
        Bar("decay's gain over a constant rate, points", accuracy[FALLING] - accuracy[CONSTANT], ">=", 2),
        Bar("growth from decay, points", abs(accuracy[GROWING] - accuracy[FALLING]), "<=", 1.5),
        Bar("updates of growth, share of decay's", updates[GROWING] / updates[FALLING], "<=", 0.6),
    ]


def draw_curves(axes: Any, found: dict[str, Tuned], clock: int) -> None:
    """Mean validation accuracy against the clock: 0 the updates, 1 the examples."""
    for name, tuned in found.items():
        curves = [result.curve for result in tuned.results if not result.failure]
        means = [
            statistics.fmean(100 * point.metrics["accuracy"] for point in points)
            for points in zip(*curves, strict=True)
        ]
        axes.plot([point[clock] for point in curves[0]], means, label=name)
    axes.set(xlabel=("updates", "examples served")[clock], ylabel="validation accuracy, %")
    axes.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = options(__doc__, name="growth", runs=("seeds", 5), rates=5, length=("epochs", 24))
    chosen = parser.parse_args(arguments)
    trials = Trials(chosen.keep)
    found = {arm.name: trials.tuned(arm, range(chosen.seeds)) for arm in arms(chosen.epochs, chosen.rates)}
    show(found)
    draw(chosen.plot, [partial(draw_curves, found=found, clock=clock) for clock in (1, 0)])
    check_bars(bars(found), chosen.check)


if __name__ == "__main__":
    main()

"""A batch 32 times as large at the same number of epochs: which recipes still learn?

    python benchmarks/rescue.py [--keep FOLDER] [--splits 2 --rates 3]

scikit-learn's digits, a perceptron 64-128-10, labels smoothed by 0.1 as in configs/quickstart.yaml, 20
epochs, linear decay to 0, weight decay 5e-4 (LAMB 0.01). Momentum at batch 16 gives the reference and the
rate that is carried over to batch 512: kept as it is, scaled by the linear rule, scaled by the square-root
rule. Momentum, LARS, LAMB and Adam are then tuned at batch 512 itself, each with as many trials. All but the
naive arms warm up for two epochs. LARS' trust coefficient is 1: its rate is a share of a layer's norm, as
LAMB's is.

Of 1,797 pictures, 250 make a noisy test, so every seed has a split of its own, and on each split every arm
is tuned anew by its accuracy on that split's validation pictures.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from trials import Arm, Bar, Trials, Tuned, check_bars, draw, middle, options, spread, table

SMALL, LARGE, MICRO = 16, 512, 64
MOMENTUM = {"name": "momentum", "momentum": 0.9, "weight_decay": 5e-4}
REFERENCE = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
CARRIED = {  # name: rule, epochs of warm-up
    "momentum, rate kept": ("none", 0),
    "momentum, linear rule": ("linear", 0),
    "momentum, linear rule and warm-up": ("linear", 2),
    "momentum, square-root rule and warm-up": ("sqrt", 2),
}
TUNED: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "momentum": (MOMENTUM, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)),
    "LARS": (
        {"name": "lars", "momentum": 0.9, "weight_decay": 5e-4, "trust_coefficient": 1.0},
        (0.01, 0.02, 0.04, 0.08, 0.16, 0.32),
    ),
    "LAMB": ({"name": "lamb", "weight_decay": 0.01}, (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)),
    "Adam": ({"name": "adam", "weight_decay": 5e-4}, (0.004, 0.008, 0.016, 0.032, 0.064, 0.128)),
}
BATCH_16, KEPT, LINEAR = "momentum, batch 16", *list(CARRIED)[:2]


def values(batch: int, optimizer: dict[str, Any], split: int, epochs: int, **schedule: Any) -> dict[str, Any]:
    """A recipe's values, without seed and rate."""
    return {
        "name": "rescue",
        "task": {"use": "tasks:DigitsFold", "with": {"fold": split, "label_smoothing": 0.1}},
        "batch": {"size": batch, "micro": min(batch, MICRO), "lanes": 8},
        "optimizer": optimizer,
        "schedule": {"decay": {"shape": "polynomial"}, **schedule},
        "train": {"epochs": epochs},
        "eval": {"every": None},
    }


def warm_up(epochs: int, all_epochs: int) -> dict[str, Any] | None:
    """Warm-up over some epochs of the usual 20, or as great a share of fewer."""
    return {"share": epochs / max(20, all_epochs)} if epochs else None


def measure(trials: Trials, split: int, rates: int, epochs: int) -> dict[str, Tuned]:
    """Every arm on one split, tuned where it is to be; the split's number is the seed too."""
    warm = {"warmup": warm_up(2, epochs)}

    def tuned(name: str, values: dict[str, Any], rates: tuple[float, ...]) -> Tuned:
        return trials.tuned(Arm(name, values, rates), seeds=[split], tuning_seeds=[split])

    reference = values(SMALL, MOMENTUM, split, epochs, **warm)
    found = {BATCH_16: tuned(BATCH_16, reference, middle(REFERENCE, rates))}
    for name, (rule, warmup_epochs) in CARRIED.items():
        scale = {"rule": rule, "base_batch": SMALL}
        carried = values(LARGE, MOMENTUM, split, epochs, scale=scale, warmup=warm_up(warmup_epochs, epochs))
        found[name] = tuned(name, carried, (found[BATCH_16].rate,))
    for name, (optimizer, tried) in TUNED.items():
        found[name] = tuned(name, values(LARGE, optimizer, split, epochs, **warm), middle(tried, rates))
    return found


def accuracies(found: Sequence[dict[str, Tuned]], name: str) -> list[float]:
    """An arm's test accuracy on every split, in percent."""
    return [100 * split[name].mean("accuracy") for split in found]


def show(found: Sequence[dict[str, Tuned]]) -> None:
    """The table."""
    head = ["arm", "batch", "updates", "trials per split", "best rates", "test accuracy, %", "test loss"]
    rows = []
    for name, first in found[0].items():
        batch = first.arm.values["batch"]["size"]
        chosen = [f"{split[name].rate:g}{'*' if split[name].edge else ''}" for split in found]
        loss = statistics.fmean(split[name].mean("loss") for split in found)
        accuracy = spread(accuracies(found, name), 2)
        tried = len(first.tried) or "none: carried over"
        updates = first.results[0].steps
        rows.append([name, batch, updates, tried, ", ".join(sorted(set(chosen))), accuracy, f"{loss:.3f}"])
    table(head, rows)
    print("\n* the least or the greatest rate that was tried")


def bars(found: Sequence[dict[str, Tuned]]) -> list[Bar]:
    """What the arms are held against, in percent."""
    accuracy = {name: statistics.fmean(accuracies(found, name)) for name in found[0]}
    return [
        Bar("naive momentum, rate kept, %", accuracy[KEPT], "<=", 93),
        Bar("naive momentum, linear rule, %", accuracy[LINEAR], "<=", 93),
        Bar("LARS, %", accuracy["LARS"], ">=", 95.5),
        Bar("LAMB, %", accuracy["LAMB"], ">=", 96),
    ]


def draw_accuracies(axes: Any, found: Sequence[dict[str, Tuned]]) -> None:
    """Test accuracy of every arm, a dot per split."""
    names = list(found[0])[::-1]
    for place, name in enumerate(names):
        runs = accuracies(found, name)
        mean = statistics.fmean(runs)
        axes.barh(place, mean, color="skyblue" if name in TUNED else "gainsboro")
        axes.plot(runs, [place] * len(runs), "k.", markersize=4)
        axes.text(80.3, place, f"{mean:.1f}", verticalalignment="center")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(80, 100), xlabel="test accuracy, %")
    axes.set_title("Digits, 20 epochs; blue: tuned at batch 512")


def draw_sensitivity(axes: Any, found: Sequence[dict[str, Tuned]]) -> None:
    """Validation accuracy against the rate, in the mean over splits."""
    for name in TUNED:
        rates = found[0][name].tried
        means = [
            statistics.fmean(100 * split[name].tried[rate]["accuracy"] for split in found) for rate in rates
        ]
        best = max(zip(means, rates, strict=True), default=(0.0, 1.0))[1]
        axes.plot([rate / best for rate in rates], means, marker="o", label=name)
    axes.set(xscale="log", xlabel="rate / best rate", ylabel="validation accuracy, %", ylim=(80, 100))
    axes.set_title("How exactly the rate must be known")
    axes.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = options(__doc__, name="rescue", runs=("splits", 5), rates=6, length=("epochs", 20))
    chosen = parser.parse_args(arguments)
    trials = Trials(chosen.keep)
    found = [measure(trials, split, chosen.rates, chosen.epochs) for split in range(chosen.splits)]
    show(found)
    draw(chosen.plot, [partial(panel, found=found) for panel in (draw_accuracies, draw_sensitivity)])
    check_bars(bars(found), chosen.check)


if __name__ == "__main__":
    main()

"""What an optimizer's state is worth: bytes of Shakespeare, by a small Transformer.

    python benchmarks/text.py [--data FILE] [--keep FOLDER] [--seeds 1 --rates 3 --steps 60]

The task of configs/shakespeare.yaml (a quarter of a million parameters, windows of 64 bytes) at batch 32 for
200 updates, a tenth of them linear warm-up, then linearly down to 0. Adam, LAMB, Adafactor and SM3, and
momentum for comparison, each with its published hyperparameters and a rate of its own, chosen by validation
loss out of as many trials. SM3 is also tried, and judged, with the schedule that its authors advise:
quadratic warm-up, a constant rate, a cool-down at the end. State is what the optimizer keeps besides weights
and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trials import Arm, Bar, Trials, Tuned, check_bars, draw, middle, options, spread, table

from trainer.plan.plan import resolve
from trainer.recipe import loader as recipes

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "shakespeare.yaml"
TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
ADAM, LAMB, ADAFACTOR, SM3 = "Adam", "LAMB", "Adafactor", "SM3, its authors' schedule"
LINEAR: dict[str, Any] = {"warmup": {"share": 0.1}, "decay": {"shape": "polynomial"}}
QUADRATIC = {"share": 0.05, "shape": "polynomial", "power": 2}
AUTHORS: dict[str, Any] = {
    "warmup": QUADRATIC,
    "decay": {"shape": "constant"},
    "cooldown": {"share": 0.1, "shape": "linear"},
}
SCHEDULES = {SM3: AUTHORS}
TRIED: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    ADAM: ({"name": "adam"}, (0.001, 0.002, 0.004, 0.008, 0.016)),
    LAMB: ({"name": "lamb"}, (0.005, 0.01, 0.02, 0.04, 0.08)),
    ADAFACTOR: ({"name": "adafactor"}, (0.01, 0.02, 0.04, 0.08, 0.16)),
    "SM3": ({"name": "sm3"}, (0.0125, 0.025, 0.05, 0.1, 0.2)),
    SM3: ({"name": "sm3"}, (0.0125, 0.025, 0.05, 0.1, 0.2)),
    "momentum": ({"name": "momentum", "momentum": 0.9}, (0.00625, 0.0125, 0.025, 0.05, 0.1)),
}


def arm(name: str, text: Path, steps: int, rates: int) -> Arm:
    """An optimizer's recipe."""
    task = recipes.read(RECIPE, [f"task.with.path={text}"]).task
    optimizer, tried = TRIED[name]
    values = {
        "name": "text",
        "task": task.model_dump(by_alias=True),
        "batch": {"size": 32, "micro": 16, "lanes": 8},
        "optimizer": optimizer,
        "schedule": SCHEDULES.get(name, LINEAR),
        "train": {"steps": steps},
        "eval": {"every": None},
    }
    return Arm(name, values, middle(tried, rates))


def state(tuned: Tuned) -> tuple[int, float]:
    """Bytes of optimizer state, in all and per parameter."""
    plan = resolve(recipes.parse(tuned.arm.recipe(tuned.rate, seed=0)))
    return plan.state_bytes, plan.state_bytes / plan.parameters


def show(found: dict[str, Tuned]) -> None:
    """The table."""
    head = [
        "optimizer",
        "rates tried",
        "best rate",
        "test loss, nats",
        "to Adam",
        "state, bytes",
        "a parameter",
    ]
    rows = []
    for name, tuned in found.items():
        rate = f"{tuned.rate:g}{' (edge)' if tuned.edge else ''}"
        behind = f"{tuned.mean('loss') - found[ADAM].mean('loss'):+.3f}"
        whole, each = state(tuned)
        loss = spread(tuned.test("loss"), 3)
        rows.append([name, len(tuned.tried), rate, loss, behind, f"{whole:,}", f"{each:.3f}"])
    table(head, rows)


def bars(found: dict[str, Tuned]) -> list[Bar]:
    """What the optimizers are held against, in nats."""
    behind = {name: tuned.mean("loss") - found[ADAM].mean("loss") for name, tuned in found.items()}
    limits = {LAMB: 0.10, ADAFACTOR: 0.10, SM3: 0.15}
    return [Bar(f"{name} behind Adam, nats", behind[name], "<=", limit) for name, limit in limits.items()]


def draw_rates(axes: Any, found: dict[str, Tuned]) -> None:
    """Validation loss against the rate."""
    for name, tuned in found.items():
        axes.plot(list(tuned.tried), [end["loss"] for end in tuned.tried.values()], marker="o", label=name)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats per byte", ylim=(None, 3.5))
    axes.legend()


def draw_states(axes: Any, found: dict[str, Tuned]) -> None:
    """Test loss against bytes of state."""
    for name, tuned in found.items():
        _, each = state(tuned)
        axes.plot([each] * len(tuned.results), tuned.test("loss"), "o", label=name)
    axes.set(xscale="log", xlabel="bytes of state per parameter", ylabel="test loss, nats per byte")
    axes.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = options(__doc__, name="text", runs=("seeds", 3), rates=5, length=("steps", 200))
    parser.add_argument("--data", type=Path, default=TEXT, metavar="FILE", help="tiny Shakespeare's text")
    chosen = parser.parse_args(arguments)
    if not chosen.data.is_file():
        print(f"skipped: {chosen.data} is not here; give the text with --data")
        return
    trials = Trials(chosen.keep)
    found = {
        name: trials.tuned(arm(name, chosen.data, chosen.steps, chosen.rates), range(chosen.seeds), (101,))
        for name in TRIED
    }
    show(found)
    draw(chosen.plot, [partial(panel, found=found) for panel in (draw_rates, draw_states)])
    check_bars(bars(found), chosen.check)


if __name__ == "__main__":
    main()

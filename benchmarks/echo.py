"""What echoing gains: CIFAR-10 with preprocessing about four times slower than training.

    python benchmarks/echo.py path/to/cifar10 [--clock both] [--plot docs/echo.png]

Every example is decoded, cleaned by a median filter and shrunk to 8 x 8; a small perceptron learns from them
with SGD and momentum until its validation loss reaches the target, in at most one pass over the data. The
rate is halved while the factor is 3 or more, for every arm alike. Two clocks:

* virtual: an example costs R = 4 upstream and 1 downstream, side by side; the pipeline's time follows from
  which examples are fresh. Counts are exact and the machine's load does not matter.
* wall: a pool of one Ray actor and the training process, each on a core of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image, ImageFilter
from torch import Tensor, nn

from data_echo import ArraySource, FactorController, Feed, InlinePreparer, Order, ParquetSource, Schedule
from data_echo.augment import flip, normalise
from data_echo.images import decode
from data_echo.preparer import Workbench

BATCH = 64
CAPACITY = 4096
RATE = 0.02
EVALUATE_EVERY = 20  # steps
DECIDE_EVERY = 10  # steps
RATIO = 4.0  # R of the virtual clock
VALIDATION = 2000


class Pictures:
    """Small clean pictures; preparing one costs more than learning from it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def source(self, split: str) -> ParquetSource:
        """All rows of a split."""
        return ParquetSource(f"{self.folder}/{split}-*.parquet")

    def prepare(self, example: dict, draw: object) -> dict:
        """uint8 [8, 8, 3] and the label."""
        clean = Image.fromarray(decode(example["img"])).filter(ImageFilter.MedianFilter(3))
        small = np.asarray(clean.resize((8, 8), Image.Resampling.BOX))
        return {"image": small, "label": example["label"]}


class Kept:
    """Pictures prepared once, for the virtual clock: the same bytes at no cost."""

    def __init__(self, block: dict[str, np.ndarray]) -> None:
        self.block = block

    def source(self, split: str) -> ArraySource:
        """The prepared training examples."""
        return ArraySource(self.block)

    def prepare(self, example: dict, draw: object) -> dict:
        """Nothing is left to do."""
        return example


def perceptron(seed: int) -> nn.Module:
    """192-1024-512-10."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def pixels(images: Tensor) -> Tensor:
    """float32 [n, 3, 8, 8]."""
    return normalise(images, (0.49, 0.48, 0.45), (0.2, 0.2, 0.2))


@dataclass
class Arm:
    """How one run is fed: its first factor, and who may change it."""

    name: str
    factor: float
    lanes: int = 8
    whole_batches: bool = False
    capacity: int = CAPACITY
    controller: Callable[[], FactorController] | None = None


@dataclass
class Outcome:
    """What a run took to the target; NaN where it was not reached within one pass."""

    fresh: float
    served: float
    seconds: float


class Run:
    """One training run, step by step."""

    def __init__(self, arm: Arm, feed: Feed, schedule: Schedule, seed: int) -> None:
        self.feed = feed
        self.schedule = schedule
        self.controller = arm.controller() if arm.controller else None
        self.model = perceptron(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, momentum=0.9)
        self.position = 0

    def step(self) -> None:
        """Serve a micro-batch and learn from it."""
        batch, draw = self.feed.micro_batch(self.position)
        halved = self.schedule.factor(self.position) >= 3
        self.optimizer.param_groups[0]["lr"] = RATE / 2 if halved else RATE
        loss = F.cross_entropy(self.model(pixels(flip(batch["image"], draw))), batch["label"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.position += 1

    def decide(self, upstream_s: float, downstream_s: float) -> None:
        """Let the controller, if there is one, change the factor from here on."""
        if self.controller and self.position % DECIDE_EVERY == 0:
            in_force = float(self.schedule.factor(2**40))
            factor = self.controller.propose(upstream_s, downstream_s, in_force)
            if factor is not None:
                self.schedule.change(self.position, factor)

    @torch.no_grad()
    def validation_loss(self, validation: dict[str, Tensor]) -> float:
        """Mean cross entropy."""
        return float(F.cross_entropy(self.model(validation["pixels"]), validation["label"]))


def schedule_of(arm: Arm, examples: int, seed: int) -> Schedule:
    """The arm's schedule, with the same capacity for all."""
    return Schedule(
        examples,
        arm.lanes,
        BATCH,
        Fraction(str(arm.factor)),
        arm.capacity,
        seed,
        whole_batches=arm.whole_batches,
    )


def virtual(arm: Arm, task: Kept, validation: dict[str, Tensor], target: float, seed: int) -> Outcome:
    """Train on prepared examples; an example costs RATIO upstream and 1 downstream."""
    examples = len(task.block["label"])
    schedule = schedule_of(arm, examples, seed)
    feed = Feed(schedule, InlinePreparer(task, seed), lanes=range(arm.lanes), seed=seed)
    run, clock, losses = Run(arm, feed, schedule, seed), 0.0, []
    while (fresh := schedule.fresh_served(run.position)) < examples:
        run.step()
        arrived = schedule.fresh_served(run.position) * RATIO
        clock = max(clock, arrived) + BATCH
        run.decide(RATIO, 1.0)
        if run.position % EVALUATE_EVERY == 0:
            losses.append(run.validation_loss(validation))
            if statistics.fmean(losses[-3:]) <= target:
                return Outcome(fresh, run.position * BATCH, clock)
    return Outcome(np.nan, np.nan, np.nan)


def wall(
    arm: Arm, actor: object, examples: int, validation: dict[str, Tensor], target: float, seed: int
) -> tuple[Outcome, dict[str, float]]:
    """Train with a pool of one actor; returns also what was measured per example."""
    from data_echo.pool import PoolPreparer

    schedule = schedule_of(arm, examples, seed)
    feed = Feed(schedule, PoolPreparer([actor]), lanes=range(arm.lanes), seed=seed)
    run, losses, evaluating = Run(arm, feed, schedule, seed), [], 0.0
    began = time.perf_counter()
    while schedule.fresh_served(run.position) < examples:
        run.step()
        waited = feed.waited_s
        elapsed = time.perf_counter() - began - evaluating
        served = run.position * BATCH
        downstream_s = (elapsed - waited) / served
        run.decide(feed.upstream_s(), downstream_s)
        if run.position % EVALUATE_EVERY == 0:
            started = time.perf_counter()
            losses.append(run.validation_loss(validation))
            evaluating += time.perf_counter() - started
            if statistics.fmean(losses[-3:]) <= target:
                break
    else:
        return Outcome(np.nan, np.nan, np.nan), {}
    fresh = schedule.fresh_served(run.position)
    measured = {"upstream_s": feed.upstream_s(), "downstream_s": downstream_s, "idle": waited / elapsed}
    feed.close()
    return Outcome(fresh, served, elapsed), measured


def median_of(outcomes: list[Outcome]) -> Outcome:
    """Column by column."""
    return Outcome(
        *(statistics.median(getattr(o, name) for o in outcomes) for name in ("fresh", "served", "seconds"))
    )


def virtual_arms() -> list[Arm]:
    """No echo, `auto`, and fixed factors: 8 lanes or one, whole batches from a full buffer or at once."""
    arms = [Arm("none", 1), Arm("auto", 1, controller=FactorController)]
    for factor in (2, 4):
        arms.append(Arm(f"factor {factor}", factor))
        arms.append(Arm(f"factor {factor}, 1 lane", factor, lanes=1))
        arms.append(Arm(f"factor {factor}, whole batches", factor, whole_batches=True))
        least = BATCH * (factor - 1)
        name = f"factor {factor}, whole batches at once"
        arms.append(Arm(name, factor, lanes=1, whole_batches=True, capacity=least))
    return arms


def prepared(folder: str) -> tuple[Kept, dict[str, Tensor], float]:
    """All training examples, the validation examples, and microseconds per example."""
    workbench = Workbench(partial(Pictures, folder), 0)
    training, microseconds = [], []
    for first in range(0, 50_000, 1000):
        done = workbench.prepare(Order("train", np.zeros(1000, np.int64), np.arange(first, first + 1000)))
        training.append(done.block)
        microseconds.append(done.seconds * 1e3)
    held_out = workbench.prepare(Order("test", np.zeros(VALIDATION, np.int64), np.arange(VALIDATION))).block
    block = {name: np.concatenate([part[name] for part in training]) for name in held_out}
    tensors = {name: torch.from_numpy(array) for name, array in held_out.items()}
    validation = {"pixels": pixels(tensors["image"]), "label": tensors["label"]}
    return Kept(block), validation, statistics.median(microseconds)


def on_the_virtual_clock(
    task: Kept, validation: dict[str, Tensor], target: float, seeds: int
) -> dict[str, Outcome]:
    """Every arm's median, printed as a table."""
    print(f"\nVirtual clock, R = {RATIO:g}, validation loss {target:g}, median of {seeds} seeds\n")
    print("| arm | fresh examples | fewer by | served examples | time gained |\n|---|---|---|---|---|")
    outcomes: dict[str, Outcome] = {}
    for arm in virtual_arms():
        outcome = median_of([virtual(arm, task, validation, target, seed) for seed in range(seeds)])
        outcomes[arm.name] = outcome
        plain = outcomes["none"]
        fewer, gain = plain.fresh / outcome.fresh, plain.seconds / outcome.seconds
        print(f"| {arm.name} | {outcome.fresh:,.0f} | {fewer:.2f} | {outcome.served:,.0f} | {gain:.2f} |")
    return outcomes


def on_the_wall_clock(folder: str, validation: dict[str, Tensor], target: float, seeds: int) -> None:
    """Interleaved runs of the arms in a pool of one actor, printed as a table."""
    import ray

    from data_echo.pool import start_pool

    cores = sorted(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    actor = start_pool(partial(Pictures, folder), 0, 1)[0]
    ray.get(actor.__ray_call__.remote(lambda _: os.sched_setaffinity(0, {cores[-1]})))
    os.sched_setaffinity(0, {cores[0]})
    arms = [
        Arm("none", 1),
        Arm("auto", 1, controller=FactorController),
        Arm("factor 2", 2),
        Arm("factor 4", 4),
    ]
    runs: dict[str, list[tuple[Outcome, dict[str, float]]]] = {arm.name: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            runs[arm.name].append(wall(arm, actor, 50_000, validation, target, seed))
    plain = median_of([outcome for outcome, _ in runs["none"]])
    print(f"\nWall clock, cores {cores[-1]} and {cores[0]}, load average before {load:.1f}\n")
    print("| arm | fresh examples | seconds | time gained | R | idle share | model / measured |")
    print("|---|---|---|---|---|---|---|")
    for name, done in runs.items():
        middle = median_of([outcome for outcome, _ in done])
        upstream, downstream, idle = (
            statistics.median(measured.get(key, np.nan) for _, measured in done)
            for key in ("upstream_s", "downstream_s", "idle")
        )
        modelled = max(upstream * middle.fresh, downstream * middle.served)
        gain, ratio = plain.seconds / middle.seconds, upstream / downstream
        print(f"| {name} | {middle.fresh:,.0f} | {middle.seconds:.1f} | {gain:.2f} | {ratio:.1f} ", end="")
        print(f"| {idle:.0%} | {modelled / middle.seconds:.2f} |")
    ray.shutdown()


def plot(outcomes: dict[str, Outcome], target: float, path: str) -> None:
    """Fresh examples to the target against the factor."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    endings = ("", ", 1 lane", ", whole batches", ", whole batches at once")
    labels = ("examples, 8 lanes", "examples, 1 lane", "whole batches, shuffled", "whole batches, at once")
    for label, ending in zip(labels, endings, strict=True):
        fresh = [outcomes["none"].fresh] + [outcomes[f"factor {factor}{ending}"].fresh for factor in (2, 4)]
        axes.plot([1, 2, 4], fresh, marker="o", label=label)
    axes.set(xlabel="echo factor", ylabel="fresh examples", xticks=[1, 2, 4], ylim=(0, None))
    axes.set_title(f"Fresh examples to a validation loss of {target:g} (CIFAR-10, 8 x 8)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--target", type=float, default=1.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", help="where to save a picture")
    parser.add_argument("--clock", choices=["virtual", "wall", "both"], default="virtual")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, validation, microseconds = prepared(options.folder)
    print(f"preparing costs {microseconds:.0f} microseconds per example")
    if options.clock != "wall":
        outcomes = on_the_virtual_clock(task, validation, options.target, options.seeds)
        if options.plot:
            plot(outcomes, options.target, options.plot)
    if options.clock != "virtual":
        on_the_wall_clock(options.folder, validation, options.target, options.seeds)


if __name__ == "__main__":
    main()

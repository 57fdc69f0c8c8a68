"""What echoing gains: CIFAR-10 with preprocessing about four times slower than training.
    python benchmarks/echo.py path/to/cifar10 [--clock wall] [--seeds 0 1 2] [--plot docs/echo.png]

Every example is decoded by Pillow, cleaned by a median filter, refused if a second filter still changes it
much, and shrunk to 8 x 8; a perceptron learns from them with SGD and momentum until its validation loss
reaches the target, in at most one pass over the data. The rate is halved while the factor is 3 or more, for
every arm alike. Two clocks:
* virtual: an example costs R = 4 upstream and 1 downstream, side by side; the pipeline's time follows from
  which examples are fresh. Counts are exact and the machine's load does not matter.
* wall: a pool of one Ray actor and the training process, each on a core of its own, with the seconds of the
  virtual clock for the R measured in that run.

`--results FILE` keeps every run and repeats none, so that they can be made in parts (`--arms`, `--seeds`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image, ImageFilter
from torch import Tensor, nn

from data_echo import (
    ArraySource,
    EchoLoader,
    FactorController,
    InlinePreparer,
    ParquetSource,
    PrepareRequest,
    Schedule,
)
from data_echo.augment import flip, normalise
from data_echo.prepare.preparer import PrepareWorker

BATCH = 64
CAPACITY = 4096
RATE = 0.02
EVALUATE_EVERY = 20  # steps
DECIDE_EVERY = 10  # steps
MOST_NOISE = 64.0  # in a cleaned picture, as the mean change of a byte
RATIO = 4.0  # R of the virtual clock
EXAMPLES, VALIDATION = 50_000, 2000


class Pictures:
    """Task of small clean pictures; preparing one costs more than learning from it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def source(self, split: str) -> ParquetSource:
        """All rows of a split."""
        return ParquetSource(f"{self.folder}/{split}-*.parquet")

    def prepare(self, example: dict, draw: object) -> dict:
        """uint8 [8, 8, 3] and the label."""
        picture = Image.open(io.BytesIO(example["img"])).convert("RGB")
        clean = picture.filter(ImageFilter.MedianFilter(3))
        settled = clean.filter(ImageFilter.MedianFilter(3))
        if np.abs(np.asarray(clean, np.int16) - np.asarray(settled)).mean() > MOST_NOISE:
            raise ValueError("the picture is noise")
        small = np.asarray(clean.resize((8, 8), Image.Resampling.BOX))
        return {"image": small, "label": example["label"]}


class PreparedPictures:
    """Pictures prepared once, for the virtual clock: the same bytes at no cost."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def source(self, split: str) -> ArraySource:
        """The prepared training examples."""
        return ArraySource(self.arrays)

    def prepare(self, example: dict, draw: object) -> dict:
        """The example itself: it is prepared already."""
        return example


class Examples:
    """The prepared examples, and a pool that prepares them; each made at its first use."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.worker = PrepareWorker(partial(Pictures, folder), 0)

    @cache  # noqa: B019 (one for the whole process)
    def training(self) -> PreparedPictures:
        """All training examples."""
        parts = [self._prepared("train", np.arange(n, n + 1000)) for n in range(0, EXAMPLES, 1000)]
        return PreparedPictures({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    @cache  # noqa: B019
    def validation(self) -> dict[str, Tensor]:
        """The first of the test examples, as the model takes them."""
        arrays = self._prepared("test", np.arange(VALIDATION))
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {"pixels": pixels(tensors["image"]), "label": tensors["label"]}

    @cache  # noqa: B019
    def actor(self) -> Any:
        """A pool of one actor on the last core; this process moves to the first."""
        import ray

        from data_echo.prepare.ray_pool import start_pool

        cores = sorted(os.sched_getaffinity(0))
        ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
        actor = start_pool(partial(Pictures, self.folder), 0, 1)[0]
        ray.get(actor.__ray_call__.remote(lambda _: os.sched_setaffinity(0, {cores[-1]})))
        os.sched_setaffinity(0, {cores[0]})
        return actor

    def _prepared(self, split: str, index: np.ndarray) -> dict[str, np.ndarray]:
        return self.worker.prepare(PrepareRequest(split, np.zeros_like(index), index)).arrays


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
    """The settings of one run: its first factor, and the controller that may change it."""

    name: str
    factor: float
    lanes: int = 8
    whole_batches: bool = False
    capacity: int = CAPACITY
    controller: Callable[[], FactorController] | None = None


@dataclass
class Outcome:
    """What a run took to the target; NaN where it was not reached within one pass.

    On the wall clock also what was measured: seconds per example upstream (all processes busy) and
    downstream, the virtual clock's seconds for these two, the share of the time that training waited, and
    the machine's load average before.
    """

    fresh: float = np.nan
    served: float = np.nan
    seconds: float = np.nan
    upstream_s: float = np.nan
    downstream_s: float = np.nan
    modelled_s: float = np.nan
    idle: float = np.nan
    load: float = np.nan


class Run:
    """One training run, step by step."""

    def __init__(self, arm: Arm, loader: EchoLoader, schedule: Schedule, seed: int) -> None:
        self.loader = loader
        self.schedule = schedule
        self.controller = arm.controller() if arm.controller else None
        self.model = perceptron(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, momentum=0.9)
        self.position = 0

    def step(self) -> None:
        """Serve a micro-batch and learn from it."""
        batch, draw = self.loader.micro_batch(self.position)
        halved = self.schedule.factor(self.position) >= 3
        self.optimizer.param_groups[0]["lr"] = RATE / 2 if halved else RATE
        loss = F.cross_entropy(self.model(pixels(flip(batch["image"], draw))), batch["label"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.position += 1

    def decide(self, upstream_s: float, downstream_s: float) -> None:
        """Let the controller, if there is one, change the factor."""
        if self.controller and self.position % DECIDE_EVERY == 0:
            in_force = float(self.schedule.factor(2**40))
            factor = self.controller.propose(upstream_s, downstream_s, in_force)
            if factor is not None:
                self.schedule.change(self.position, factor)

    @torch.no_grad()
    def validation_loss(self, validation: dict[str, Tensor]) -> float:
        """Mean cross entropy."""
        return float(F.cross_entropy(self.model(validation["pixels"]), validation["label"]))


def schedule_of(arm: Arm, seed: int) -> Schedule:
    """The arm's schedule, with the same capacity for all."""
    return Schedule(
        EXAMPLES,
        arm.lanes,
        BATCH,
        Fraction(str(arm.factor)),
        arm.capacity,
        seed,
        whole_batches=arm.whole_batches,
    )


def clock(schedule: Schedule, steps: int, upstream: float, downstream: float) -> float:
    """The time of some steps, given an example's: a step begins when its examples have arrived."""
    now = 0.0
    for j in range(steps):
        now = max(now, schedule.fresh_served(j + 1) * upstream) + BATCH * downstream
    return now


def virtual(arm: Arm, data: Examples, target: float, seed: int) -> Outcome:
    """Train on prepared examples; an example costs RATIO upstream and 1 downstream."""
    task, validation = data.training(), data.validation()
    schedule = schedule_of(arm, seed)
    loader = EchoLoader(schedule, InlinePreparer(task, seed), lanes=range(arm.lanes), seed=seed)
    run, losses = Run(arm, loader, schedule, seed), []
    while (fresh := schedule.fresh_served(run.position)) < EXAMPLES:
        run.step()
        run.decide(RATIO, 1.0)
        if run.position % EVALUATE_EVERY == 0:
            losses.append(run.validation_loss(validation))
            if statistics.fmean(losses[-3:]) <= target:
                return Outcome(fresh, run.position * BATCH, clock(schedule, run.position, RATIO, 1.0))
    return Outcome()


def wall(arm: Arm, data: Examples, target: float, seed: int) -> Outcome:
    """Train with a pool of one actor."""
    import ray

    from data_echo.prepare.ray_pool import PoolPreparer

    validation, actor, load = data.validation(), data.actor(), os.getloadavg()[0]
    ray.get(actor.ready.remote())  # the requests of the run before this one are done now
    schedule = schedule_of(arm, seed)
    loader = EchoLoader(schedule, PoolPreparer([actor]), lanes=range(arm.lanes), seed=seed)
    run, losses = Run(arm, loader, schedule, seed), []
    began = time.perf_counter()
    while (fresh := schedule.fresh_served(run.position)) < EXAMPLES:
        run.step()
        if run.position % EVALUATE_EVERY == 0:
            losses.append(run.validation_loss(validation))
        elapsed, served = time.perf_counter() - began, run.position * BATCH
        up, down = loader.upstream_s(), (elapsed - loader.waited_s) / served
        if run.position % EVALUATE_EVERY == 0 and statistics.fmean(losses[-3:]) <= target:
            modelled, idle = clock(schedule, run.position, up, down), loader.waited_s / elapsed
            return Outcome(fresh, served, elapsed, up, down, modelled, idle, load)
        run.decide(up, down)
    return Outcome()


def median_of(outcomes: list[Outcome]) -> Outcome:
    """Column by column."""
    return Outcome(*(statistics.median(column) for column in zip(*map(_values, outcomes), strict=True)))


def _values(outcome: Outcome) -> list[float]:
    return list(asdict(outcome).values())


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


def wall_arms() -> list[Arm]:
    """No echo, `auto`, and fixed factors."""
    return [arm for arm in virtual_arms() if "," not in arm.name]


class Results:
    """Runs by clock, arm, seed and target; kept in a file, if there is one."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.known: dict[tuple, Outcome] = {}
        if path and Path(path).exists():
            for line in map(json.loads, Path(path).read_text().splitlines()):
                self.known[tuple(line["run"])] = Outcome(**line["outcome"])

    def of(self, run: tuple, make: Callable[[], Outcome]) -> Outcome:
        """The outcome of a run, which is made now unless it is known."""
        if run not in self.known:
            self.known[run] = make()
            if self.path:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"run": run, "outcome": asdict(self.known[run])}) + "\n")
        return self.known[run]


def medians(clock: str, arms: list[Arm], options: Any) -> dict[str, Outcome]:
    """Every arm's median over the seeds; on the wall clock the arms take turns."""
    data, results, train = Examples(options.folder), Results(options.results), CLOCKS[clock]
    chosen = [arm for arm in arms if options.arms is None or arm.name in options.arms]
    done: dict[str, list[Outcome]] = {arm.name: [] for arm in chosen}
    for seed in options.seeds:
        for arm in chosen:
            make = partial(train, arm, data, options.target, seed)
            done[arm.name].append(results.of((clock, arm.name, seed, options.target), make))
    return {name: median_of(outcomes) for name, outcomes in done.items()}


CLOCKS = {"virtual": virtual, "wall": wall}


def print_virtual(outcomes: dict[str, Outcome], options: Any) -> None:
    """A table; gains are over the first arm."""
    print(f"\nVirtual clock, R = {RATIO:g}, validation loss {options.target:g}, seeds {options.seeds}\n")
    print("| arm | fresh examples | fewer by | served examples | time gained |\n|---|---|---|---|---|")
    plain = next(iter(outcomes.values()))
    for name, outcome in outcomes.items():
        fewer, gain = plain.fresh / outcome.fresh, plain.seconds / outcome.seconds
        print(f"| {name} | {outcome.fresh:,.0f} | {fewer:.2f} | {outcome.served:,.0f} | {gain:.2f} |")


def print_wall(outcomes: dict[str, Outcome], options: Any) -> None:
    """A table; gains are over the first arm."""
    print(f"\nWall clock, validation loss {options.target:g}, seeds {options.seeds}\n")
    print(
        "| arm | fresh examples | seconds | time gained | R | idle share | model / measured | load before |"
    )
    print("|---|---|---|---|---|---|---|---|")
    plain = next(iter(outcomes.values()))
    for name, outcome in outcomes.items():
        gain, ratio = plain.seconds / outcome.seconds, outcome.upstream_s / outcome.downstream_s
        print(f"| {name} | {outcome.fresh:,.0f} | {outcome.seconds:.1f} | {gain:.2f} | {ratio:.1f} ", end="")
        print(f"| {outcome.idle:.0%} | {outcome.modelled_s / outcome.seconds:.2f} | {outcome.load:.1f} |")


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="only these, by their names in the tables")
    parser.add_argument("--results", help="file in which runs are kept; those in it are not repeated")
    parser.add_argument("--plot", help="where to save a picture")
    parser.add_argument("--clock", choices=["virtual", "wall", "both"], default="virtual")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.clock != "wall":
        outcomes = medians("virtual", virtual_arms(), options)
        print_virtual(outcomes, options)
        if options.plot:
            plot(outcomes, options.target, options.plot)
    if options.clock != "virtual":
        print_wall(medians("wall", wall_arms(), options), options)


if __name__ == "__main__":
    main()

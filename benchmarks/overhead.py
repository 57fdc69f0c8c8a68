"""What Lockstep's loop costs next to a hand-written one.

    python benchmarks/overhead.py [--data FOLDER] [--pairs 5] [--steps 200]

Two workers under torchrun (gloo, one thread each) train cifar10_quick's network on the same decoded images in
memory, echo off, at the same batch: once through Lockstep's loop, once through a plain
DistributedDataParallel script with DDP's documented defaults. The two take turns; the median ratio of seconds
per step over the pairs is the result, and below 1.05 the aim. Then, in one process, what a step on digits
costs beyond the bare forward pass, backward pass and update: microseconds, 500 the aim.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from data_echo import ArraySource, InlinePreparer
from trainer.build import build
from trainer.distributed.group import WorkerGroup
from trainer.loop import steps
from trainer.plan.inputs import Inputs
from trainer.plan.plan import resolve
from trainer.recipe.schema import Recipe
from trainer.task import load
from trainer.tasks.cifar10 import MEAN, STD, Cifar10
from trainer.tasks.digits import Digits

BATCH, WORKERS, WARM_UP_STEPS, LEARNING_RATE = 256, 2, 20, 0.1
IMAGES = 10_000


class InMemory(Cifar10):
    """CIFAR-10 with its images decoded beforehand."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.decoded = ArraySource(decoded(path))

    def source(self, split: str) -> ArraySource:
        return self.decoded

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        return example


def decoded(path: str) -> dict[str, np.ndarray]:
    """The first training images, decoded once and kept in its temporary folder."""
    task = Cifar10(path)
    source = task.source("train")
    examples = [task.prepare(source[i], None) for i in range(IMAGES)]
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def lockstep(path: str) -> Iterator[float]:
    """Losses of Lockstep's loop, a step each."""
    recipe = Recipe.model_validate(
        {
            "name": "overhead",
            "task": {"use": "trainer.tasks.cifar10:Cifar10", "with": {"path": path}},
            "batch": {"size": BATCH, "micro": BATCH // WORKERS, "lanes": 8},
            "optimizer": {"name": "nag", "lr": LEARNING_RATE, "momentum": 0.9},
            "train": {"steps": 100_000},
            "run": {"workers": WORKERS, "device": "cpu"},
        }
    )
    task, group = InMemory(path), WorkerGroup.join("cpu")
    plan = resolve(recipe, Inputs.of(recipe, task))
    training = build(plan, task, group, InlinePreparer(task, recipe.seed))
    for step in steps(training):
        yield step.loss


def by_hand(path: str) -> Iterator[float]:
    """The same training as one writes it without Lockstep."""
    dist.init_process_group("gloo")
    arrays = decoded(path)
    images, labels = torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["label"])
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    torch.manual_seed(0)
    model = DistributedDataParallel(Cifar10(path).model())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True)
    for chosen in shares(len(images), dist.get_rank()):
        x = crop_and_flip(images[chosen].permute(0, 3, 1, 2)).float().div_(255).sub_(mean).div_(std)
        loss = F.cross_entropy(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def shares(examples: int, rank: int) -> Iterator[Tensor]:
    """This rank's share of each batch, pass after pass."""
    generator = torch.Generator().manual_seed(0)
    for _ in itertools.count():
        for batch in torch.randperm(examples, generator=generator).split(BATCH):
            if len(batch) == BATCH:
                yield batch[rank::WORKERS]


def crop_and_flip(images: Tensor) -> Tensor:
    """A random crop out of four pixels of padding, mirrored half of the time: uint8 [n, 3, 32, 32]."""
    padded = F.pad(images, (4, 4, 4, 4))
    n = len(images)
    rows = torch.randint(0, 9, (n, 1)) + torch.arange(32)
    columns = torch.randint(0, 9, (n, 1)) + torch.arange(32)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    numbers = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[numbers, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


ARMS: dict[str, Callable[[str], Iterator[float]]] = {"lockstep": lockstep, "by hand": by_hand}


def work(arm: str, path: str, count: int) -> None:
    """One worker of one arm; rank 0 prints the seconds per step."""
    torch.set_num_threads(1)
    losses = ARMS[arm](path)
    for _ in range(WARM_UP_STEPS):
        next(losses)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(losses)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    if os.environ["RANK"] == "0":
        print(json.dumps({"wall": wall_s / count, "cpu": cpu_s / count}))
    dist.destroy_process_group()


def compare(path: str, pairs: int, count: int) -> None:
    """Take turns, and print the ratios: of wall time, and of one worker's CPU time, which a busy machine
    stretches less.
    """
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    for number in range(pairs):
        order = list(ARMS) if number % 2 == 0 else list(ARMS)[::-1]
        seconds = {arm: run_arm(arm, path, count) for arm in order}
        for clock, found in ratios.items():
            found.append(seconds["lockstep"][clock] / seconds["by hand"][clock])
        shown = ", ".join(
            f"{arm} {1000 * seconds[arm]['wall']:.1f} ms ({1000 * seconds[arm]['cpu']:.1f} cpu)"
            for arm in ARMS
        )
        print(f"pair {number + 1}: {shown}", flush=True)
    for clock, found in ratios.items():
        print(
            f"lockstep / by hand, {clock} time: median {statistics.median(found):.3f}, "
            f"from {min(found):.3f} to {max(found):.3f} ({pairs} pairs of {count} steps, aim 1.05)"
        )


def run_arm(arm: str, path: str, count: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(WORKERS),
    ]
    command += [__file__, "--arm", arm, "--data", path, "--steps", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def digits(count: int) -> None:
    """Microseconds of a step on digits beyond forward, backward and update on the same examples."""
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(
        {
            "name": "overhead",
            "task": {"use": "trainer.tasks.digits:Digits"},
            "batch": {"size": 512, "micro": 64, "lanes": 8},
            "optimizer": {"name": "lamb", "lr": 0.01},
            "echo": {"factor": 2, "capacity": 512},
            "train": {"steps": 100_000},
            "run": {"device": "cpu", "stack": 8},
        }
    )
    task: Digits = load(recipe.task)  # type: ignore[assignment]
    plan = resolve(recipe, Inputs.of(recipe, task))
    training = build(plan, task, WorkerGroup(), InlinePreparer(task, 0))
    ours, optimizer = steps(training), training.optimizer
    batch = training.forward_backward.load(training.own_micro_batches(8))
    training.progress.position += 8

    def bare() -> None:
        optimizer.zero_grad()
        loss, number = task.loss(training.model, batch)
        (loss / number).backward()
        optimizer.step()

    whole, waits, alone = [], [], []
    for _ in range(count):
        started = time.perf_counter()
        waits.append(next(ours).seconds["wait"])
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
        bare()
        alone.append(time.perf_counter() - started)
    total, wait, floor = (statistics.median(seconds) for seconds in (whole, waits, alone))
    print(
        f"digits, {training.execution.stack} micro-batches at a time: a step {1e6 * total:.0f} us, "
        f"of which data {1e6 * wait:.0f}, forward + backward + update {1e6 * floor:.0f}, "
        f"and Lockstep's own {1e6 * (total - wait - floor):.0f} us (aim 500)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
    parser.add_argument("--data", default=str(default), help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        work(arguments.arm, arguments.data, arguments.steps)
        return
    digits(arguments.steps)
    if Path(arguments.data).is_dir():
        compare(arguments.data, arguments.pairs, arguments.steps)
    else:
        print(f"skipped against DDP: {arguments.data} is not here; give --data")


if __name__ == "__main__":
    main()

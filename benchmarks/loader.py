"""The pool against torch's DataLoader and Ray Data: CIFAR-10 JPEGs from Parquet, the same decoder, one
process.

    python benchmarks/loader.py path/to/cifar10 [--ray-data]

Prints examples per second of each over whole passes (interleaved rounds, median and range), the first batch's
seconds after Ray is up, the longest gap at a new pass, and the share of its time that a loop waits when the
pool is twice as fast as the loop.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import ray
import torch

from data_echo import Feed, ParquetSource, Schedule
from data_echo.images import decode
from data_echo.pool import PoolPreparer, start_pool

BATCH = 256


class Pictures:
    """Decoding and nothing else."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def source(self, split: str) -> ParquetSource:
        """All rows of a split."""
        return ParquetSource(f"{self.folder}/{split}-*.parquet")

    def prepare(self, example: dict, draw: object) -> dict:
        """uint8 [32, 32, 3] and the label."""
        return {"image": decode(example["img"]), "label": example["label"]}


class WholeBatches(torch.utils.data.Dataset):
    """What is fastest for a DataLoader: an item is a whole batch."""

    def __init__(self, folder: str) -> None:
        self.source = Pictures(folder).source("train")

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = [self.source[index] for index in indices]
        images = np.stack([decode(row["img"]) for row in rows])
        return {
            "image": torch.from_numpy(images),
            "label": torch.from_numpy(np.stack([row["label"] for row in rows])),
        }


class Shuffled(torch.utils.data.Sampler):
    """Index lists of a pass."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.examples).tolist()
        return iter([order[n : n + BATCH] for n in range(0, self.examples - BATCH + 1, BATCH)])


def cpu_s(processes: list[int]) -> float:
    """CPU seconds that processes have used."""
    ticks = 0
    for process in processes:
        with open(f"/proc/{process}/stat") as file:
            ticks += sum(int(field) for field in file.read().rsplit(")", 1)[1].split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


class LoaderRun:
    """torch's DataLoader with one worker process that lives from pass to pass."""

    def __init__(self, folder: str) -> None:
        data = WholeBatches(folder)
        self.loader = torch.utils.data.DataLoader(
            data, batch_size=None, sampler=Shuffled(len(data.source)), num_workers=1, persistent_workers=True
        )
        self.batches = self._forever()
        self.next()
        self.processes = [process.pid for process in multiprocessing.active_children()]

    def _forever(self) -> Iterator[dict]:
        while True:
            yield from self.loader

    def next(self) -> None:
        """Take a batch."""
        next(self.batches)


class PoolRun:
    """The pool with one actor, the feed without echo."""

    def __init__(self, folder: str, examples: int) -> None:
        self.actors = start_pool(partial(Pictures, folder), 0, 1)
        schedule = Schedule(examples, 8, BATCH, 1)
        self.feed = Feed(schedule, PoolPreparer(self.actors), lanes=range(8))
        self.position = 0
        self.processes = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in self.actors])

    def next(self) -> None:
        """Take a batch."""
        self.feed.micro_batch(self.position)
        self.position += 1


class RayDataRun:
    """Ray Data with one task at a time, and blocks small enough to flow."""

    def __init__(self, folder: str) -> None:
        from ray import data

        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 4 * 2**20
        rows = data.read_parquet([f"{folder}/{name}" for name in _training_files(folder)])
        self.data = rows.map_batches(_decoded, batch_size=BATCH, num_cpus=1, concurrency=1)
        self.batches = self._forever()

    def _forever(self) -> Iterator[dict]:
        while True:
            yield from self.data.iter_batches(batch_size=BATCH)

    def next(self) -> None:
        """Take a batch."""
        next(self.batches)


def _training_files(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("train-"))


def _decoded(batch: dict) -> dict:
    images = np.stack([decode(image["bytes"]) for image in batch["img"]])
    return {"image": images, "label": batch["label"]}


def intervals(take: Callable[[], None], batches: int) -> np.ndarray:
    """Seconds from batch to batch."""
    times = [time.perf_counter()]
    for _ in range(batches):
        take()
        times.append(time.perf_counter())
    return np.diff(times)


def waiting_share(run: PoolRun, upstream_s: float, batches: int) -> float:
    """Share of the time that a loop of twice the pool's seconds per batch waits for data."""
    for _ in range(20):
        run.next()
    began, waited = time.perf_counter(), run.feed.waited_s
    for _ in range(batches):
        run.next()
        time.sleep(2 * upstream_s)
    return (run.feed.waited_s - waited) / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ray-data", action="store_true", help="measure Ray Data too (minutes)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    examples = len(Pictures(options.folder).source("train"))
    pass_batches = examples // BATCH
    load = os.getloadavg()[0]
    # Ray's processes are nice by default, a DataLoader's are not: beside other work that decides.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)

    began = time.perf_counter()
    pool = PoolRun(options.folder, examples)
    pool.next()
    print(f"load average before: {load:.1f}")
    print(f"pool: first batch {time.perf_counter() - began:.2f} s after Ray is up")
    loader = LoaderRun(options.folder)
    runs = {"DataLoader, 1 process, whole batches": loader, "pool, 1 actor": pool}
    for run in runs.values():  # files are read, caches filled
        intervals(run.next, pass_batches)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    gaps: dict[str, list[float]] = {name: [] for name in runs}
    own_us: dict[str, float] = {}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            work, own = cpu_s(run.processes), time.process_time()
            seconds = intervals(run.next, 2 * pass_batches)
            microseconds = 1e6 / (BATCH * len(seconds))
            costs[name].append((cpu_s(run.processes) - work) * microseconds)
            own_us[name] = (time.process_time() - own) * microseconds
            rates[name].append(BATCH * len(seconds) / seconds.sum())
            new_pass = seconds[pass_batches - 1 : pass_batches + 3]
            gaps[name].append(float(new_pass.max() / seconds.mean()))
    for name in runs:
        low, high = min(rates[name]), max(rates[name])
        middle, gap = statistics.median(rates[name]), statistics.median(gaps[name])
        print(f"{name}: {middle:,.0f} examples/s ({low:,.0f} to {high:,.0f})")
        print(f"    CPU microseconds per example: {statistics.median(costs[name]):.0f} preparing, ", end="")
        print(f"{own_us[name]:.0f} receiving; longest of the batches at a new pass: {gap:.1f} of the mean")
    for what, pairs in {
        "rate": zip(*rates.values(), strict=True),
        "CPU": zip(*costs.values(), strict=True),
    }.items():
        ratios = [ours / theirs if what == "rate" else theirs / ours for theirs, ours in pairs]
        middle = statistics.median(ratios)
        print(f"pool / DataLoader by {what}: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); bar .85")
    share = waiting_share(pool, BATCH / statistics.median(rates["pool, 1 actor"]), 100)
    print(f"waiting with the pool twice as fast as the loop: {share:.2%}; bar 2 %")
    del loader, runs
    for actor in pool.actors:
        ray.kill(actor)
    if options.ray_data:
        data = RayDataRun(options.folder)
        seconds = [intervals(data.next, pass_batches).sum() for _ in range(2)]
        ray_data = BATCH * pass_batches / min(seconds)
        ours = statistics.median(rates["pool, 1 actor"])
        del data  # before Ray goes, or it complains
        print(f"Ray Data, 1 task at a time: {ray_data:,.0f} examples/s")
        print(f"pool / Ray Data by rate: {ours / ray_data:.1f}; bar 5")
    ray.shutdown()


if __name__ == "__main__":
    main()

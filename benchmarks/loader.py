"""The pool against torch's DataLoader and Ray Data: CIFAR-10 JPEGs from Parquet, the same decoder, one
process.

    python benchmarks/loader.py path/to/cifar10 [--ray-data]

Prints examples per second of each over whole passes (interleaved rounds, median and range), the seconds from
Ray's start to the first batch, the longest gap at a new pass, and the fraction of its time that a loop waits
when the pool is twice as fast as the loop.

The pool and DataLoader serve each pass in a new random order. Ray Data is measured doing the same
(`random_shuffle`), shuffling within a buffer as its documentation advises, and reading the files as they lie;
each in a cluster of one CPU, as the others have one process, and of two, where it reads while it decodes;
with small blocks, which are streamed, and with blocks of the default size.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial

import numpy as np
import ray
import torch

from data_echo import EchoLoader, ParquetSource, Schedule
from data_echo.images import decode
from data_echo.prepare.ray_pool import PoolPreparer, start_pool

BATCH = 256


class Pictures:
    """Task that decodes and does nothing else."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def source(self, split: str) -> ParquetSource:
        """All rows of a split."""
        return ParquetSource(f"{self.folder}/{split}-*.parquet")

    def prepare(self, example: dict, draw: object) -> dict:
        """uint8 [32, 32, 3] and the label."""
        return {"image": decode(example["img"]), "label": example["label"]}


class WholeBatches(torch.utils.data.Dataset):
    """Dataset whose items are whole batches, the fastest way to use a DataLoader."""

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
        self.processes = [process.pid for process in multiprocessing.active_children() if process.pid]

    def _forever(self) -> Iterator[dict]:
        while True:
            yield from self.loader

    def next(self) -> None:
        """Take a batch."""
        next(self.batches)


class PoolRun:
    """The pool with one actor, the loader without echo."""

    def __init__(self, folder: str, examples: int) -> None:
        self.actors = start_pool(partial(Pictures, folder), 0, 1)
        schedule = Schedule(examples, 8, BATCH, 1)
        self.loader = EchoLoader(schedule, PoolPreparer(self.actors), lanes=range(8))
        self.position = 0
        self.processes = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in self.actors])

    def next(self) -> None:
        """Take a batch."""
        self.loader.micro_batch(self.position)
        self.position += 1


class RayDataRun:
    """Ray Data with one decoding task at a time."""

    def __init__(self, folder: str, shuffle: str, block_mib: int) -> None:
        from ray import data

        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = block_mib * 2**20
        rows = data.read_parquet([f"{folder}/{name}" for name in _training_files(folder)])
        if shuffle == "all rows":
            rows = rows.random_shuffle()
        compute = data.TaskPoolStrategy(size=1)
        self.data = rows.map_batches(_decoded, batch_size=BATCH, num_cpus=1, compute=compute)
        self.buffer_rows = 4096 if shuffle == "in a buffer" else None
        self.batches = self._forever()

    def _forever(self) -> Generator[dict]:
        while True:
            yield from self.data.iter_batches(batch_size=BATCH, local_shuffle_buffer_size=self.buffer_rows)

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
    """Fraction of the time that a loop of twice the pool's seconds per batch waits for data."""
    for _ in range(20):
        run.next()
    began, waited = time.perf_counter(), run.loader.waited_s
    for _ in range(batches):
        run.next()
        time.sleep(2 * upstream_s)
    return (run.loader.waited_s - waited) / (time.perf_counter() - began)


def in_rounds(runs: dict[str, PoolRun | LoaderRun], rounds: int, pass_batches: int) -> dict[str, list[float]]:
    """Measure the runs in turn and print what was found; returns examples per second of every round."""
    for run in runs.values():  # files are read, caches filled
        intervals(run.next, pass_batches)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    gaps: dict[str, list[float]] = {name: [] for name in runs}
    costs: dict[str, list[float]] = {name: [] for name in runs}
    own_us: dict[str, float] = {}
    for _ in range(rounds):
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
    print_ratios("rate", [ours / theirs for theirs, ours in zip(*rates.values(), strict=True)])
    print_ratios("CPU", [theirs / ours for theirs, ours in zip(*costs.values(), strict=True)])
    return rates


def print_ratios(what: str, ratios: list[float]) -> None:
    """The pool against DataLoader."""
    middle = statistics.median(ratios)
    print(f"pool / DataLoader by {what}: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); bar .85")


def pool_and_data_loader(folder: str, rounds: int) -> float:
    """Measure and print; returns the pool's examples per second."""
    examples = len(Pictures(folder).source("train"))
    start_ray(2)
    began = time.perf_counter()
    pool = PoolRun(folder, examples)
    pool.next()
    print(f"pool: first batch {time.perf_counter() - began:.2f} s after Ray is up")
    runs: dict[str, PoolRun | LoaderRun] = {
        "DataLoader, 1 process, whole batches": LoaderRun(folder),
        "pool, 1 actor": pool,
    }
    rate = statistics.median(in_rounds(runs, rounds, examples // BATCH)["pool, 1 actor"])
    share = waiting_share(pool, BATCH / rate, 100)
    print(f"waiting with the pool twice as fast as the loop: {share:.2%}; bar 2 %")
    ray.shutdown()
    return rate


def ray_data(folder: str, ours: float) -> None:
    """Measure and print, after a first pass two whole ones."""
    pass_batches = len(Pictures(folder).source("train")) // BATCH
    for cpus in (1, 2):
        start_ray(cpus)
        for shuffle, block_mib in (("all rows", 4), ("in a buffer", 4), ("none", 4), ("all rows", 128)):
            run = RayDataRun(folder, shuffle, block_mib)
            intervals(run.next, pass_batches)
            rate = 2 * pass_batches * BATCH / intervals(run.next, 2 * pass_batches).sum()
            run.batches.close()  # before Ray goes, or it complains
            print(f"Ray Data, {cpus} CPU, blocks of {block_mib} MiB, shuffling {shuffle}: ", end="")
            print(f"{rate:,.0f} examples/s; pool / Ray Data {ours / rate:.1f}; bar 5", flush=True)
        ray.shutdown()


def start_ray(cpus: int) -> None:
    """Start a cluster on this machine, which `ray.shutdown` ends."""
    # Ray's processes are nice by default, a DataLoader's are not, which matters on a loaded machine.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(address="local", include_dashboard=False, num_cpus=cpus, log_to_driver=False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ray-data", action="store_true", help="measure Ray Data too (minutes)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load average before: {os.getloadavg()[0]:.1f}")
    ours = pool_and_data_loader(options.folder, options.rounds)
    if options.ray_data:
        ray_data(options.folder, ours)


if __name__ == "__main__":
    main()

"""How fast a step is: `python benchmarks/optimizer_step.py [--check]`.

Each optimizer steps through its public `step()` on the parameter shapes of a real model, gradients as
backward leaves them, in rounds; an in-place axpy over as many numbers follows each step. A ratio is the best
of the steps over the time in which, at the bandwidth of the best of these axpys, the fewest bytes move that
the rule's stages can read and write; then the same of the medians. With one thread the time is the process's
CPU time, which a shared machine inflates least; with more it is the wall's, on a GPU the device's.

Needs torch alone, from the repository's root or with the packages installed. `--others` also measures timm,
pytorch_optimizer and torch where they are installed. `--check` exits with 1 where a bar is missed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for all, or luck decides how fast memory is

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or its workers' CPU time would not be counted

import optim
from optim.engine.stage import Stage
from optim.registry import rules

FLAT_BARS = {
    "lamb": 1.20,
    "lars": 1.30,
    "novograd": 1.25,
    "lion": 1.15,
    "adax": 1.15,
    "adafactor": 3.5,
    "sm3": 4.5,
}
ALONE_AIMS = {"lamb": 1.6, "lion": 1.8}
WITHOUT_COMPILER_BAR = 4.0
CUDA_AIMS = {"lion": 1 / 0.85, "adax": 1 / 0.85, "lamb": 1 / 0.75, "lars": 1 / 0.75, "novograd": 1 / 0.75} | {
    "adafactor": 2.0,
    "sm3": 2.0,
}
COMPILE_BAR_S = 25.0
AXPY_BYTES = 12


def resnet50() -> Iterator[tuple[int, ...]]:
    """The parameter shapes of torchvision's ResNet-50, 25.6 million numbers."""
    yield from [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from [(width, inputs, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            yield from [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                yield from [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    yield from [(1000, 2048), (1000,)]


def bert(hidden: int, layers: int) -> Iterator[tuple[int, ...]]:
    """The parameter shapes of BERT: base 110 million numbers, large 335 million."""
    yield from [(30522, hidden), (512, hidden), (2, hidden), (hidden,), (hidden,)]
    for _ in range(layers):
        yield from [(hidden, hidden), (hidden,)] * 4
        yield from [
            (hidden,),
            (hidden,),
            (4 * hidden, hidden),
            (4 * hidden,),
            (hidden, 4 * hidden),
            (hidden,),
        ]
        yield from [(hidden,), (hidden,)]
    yield from [(hidden, hidden), (hidden,)]


def resnet20() -> Iterator[tuple[int, ...]]:
    """The parameter shapes of a ResNet-20 for small pictures, 0.27 million numbers."""
    yield from [(16, 3, 3, 3), (16,), (16,)]
    inputs = 16
    for width in (16, 32, 64):
        for _ in range(3):
            yield from [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            inputs = width
    yield from [(10, 64), (10,)]


MODELS: dict[str, Callable[[], Iterator[tuple[int, ...]]]] = {
    "resnet20": resnet20,
    "resnet50": resnet50,
    "bert-base": lambda: bert(768, 12),
    "bert-large": lambda: bert(1024, 24),
}


class Clock:
    """Seconds of work: CPU time of one thread, wall time of several, device time of a GPU."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._now = time.process_time if threads == 1 and device.type == "cpu" else time.perf_counter

    def __call__(self, work: Callable[[], object]) -> float:
        self._wait()
        start = self._now()
        work()
        self._wait()
        return self._now() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def parameters_of(model: str, device: torch.device) -> list[nn.Parameter]:
    """Parameters with gradients as a backward pass leaves them."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(0.05 * torch.randn(shape, device=device)) for shape in MODELS[model]()]
    for p in parameters:
        p.grad = 1e-3 * torch.randn_like(p)
    return parameters


def minimum_bytes(name: str) -> int:
    """Bytes per parameter that a rule's stages read and write, counted by watching one small step."""
    p = nn.Parameter(torch.ones(64, 64))
    p.grad = torch.ones(64, 64)
    run, moved = Stage.run, 0

    def watched(stage: Stage, h: object, arrays: dict[str, Tensor], *how: Any) -> list[Tensor]:
        nonlocal moved
        large = {letter: x for letter, x in arrays.items() if x.shape == p.shape}
        before = {letter: x._version for letter, x in large.items()}
        sums = run(stage, h, arrays, *how)
        moved += 4 * sum(letter in stage.takes for letter in large)
        moved += 4 * sum(x._version != before[letter] for letter, x in large.items())
        return sums

    Stage.run = watched  # type: ignore[assignment]
    try:
        with patch.object(rules()[name], "scratch", ()):  # what is kept is read again
            optim.build(name, [p], engine="tensor").step()
    finally:
        Stage.run = run  # type: ignore[method-assign]
    return moved


class Contender:
    """One optimizer on its own copy of the model's parameters."""

    def __init__(self, label: str, name: str, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
        self.label, self.name, self.optimizer = label, name, optimizer
        self.times: list[float] = []
        self.axpys: list[float] = []
        self._clock = clock
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad.clone() for p in self._parameters]
        start = _cpu_seconds()
        self.step()
        self.first_step_cpu_s = _cpu_seconds() - start
        self.step()
        same = all(torch.equal(p.grad, g) for p, g in zip(self._parameters, gradients, strict=True))
        self.changes_gradients = not same
        self.times.clear()

    def step(self) -> None:
        """One timed step at a new rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4 if group["lr"] is None else group["lr"] * 1.001
        self.times.append(self._clock(self.optimizer.step))


def _cpu_seconds() -> float:
    import resource

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def ours(
    name: str, model: str, device: torch.device, clock: Clock, engines: list[str]
) -> Iterator[Contender]:
    """Our rule in its ways: flat, alone, and without a compiler."""
    for engine in engines:
        for flatten in (True, False):
            parameters = parameters_of(model, device)
            gradients = [torch.as_tensor(p.grad) for p in parameters]
            optimizer = optim.build(name, parameters, engine=engine, flatten=flatten)
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = torch.as_tensor(p.grad).copy_(g) if flatten else g
            yield Contender(f"{engine}, {'flat' if flatten else 'alone'}", name, optimizer, clock)


def others(name: str, model: str, device: torch.device, clock: Clock) -> Iterator[Contender]:
    """The same optimizer of other libraries, where they are installed."""
    from tests.optim.witnesses import pytorch_optimizer, timm_optimizer

    timm_modules = {
        "lamb": ("lamb", "Lamb"),
        "lars": ("lars", "Lars"),
        "lion": ("lion", "Lion"),
        "adafactor": ("adafactor", "Adafactor"),
        "novograd": ("nvnovograd", "NvNovoGrad"),
    }
    their_names = {"lamb": "Lamb", "lars": "LARS", "lion": "Lion", "novograd": "NovoGrad", "sm3": "SM3"}
    kinds: dict[str, Callable[..., torch.optim.Optimizer] | None] = {
        "timm": timm_optimizer(*timm_modules[name]) if name in timm_modules else None,
        "pytorch_optimizer": pytorch_optimizer(their_names[name]) if name in their_names else None,
        "torch": torch.optim.Adafactor if name == "adafactor" else None,
    }
    for library, kind in kinds.items():
        if kind is not None:
            adapts = {"always_adapt": True} if library == "timm" and name in ("lamb", "lars") else {}
            yield Contender(library, name, kind(parameters_of(model, device), lr=1e-3, **adapts), clock)


def measure(
    contenders: list[Contender], numbers: int, device: torch.device, clock: Clock, rounds: int
) -> None:
    """Let all contenders step in turn, each step followed by an axpy."""
    x, y = torch.zeros(numbers, device=device), torch.ones(numbers, device=device)
    for number in range(rounds):
        first = number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender.step()
            contender.axpys.append(clock(lambda: x.add_(y)))


def main() -> int:
    """Measure, print, and compare with the bars."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="optimizer-step-") as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty  # or what was compiled before would be looked up
        return _measure_all(options)


def _measure_all(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = Clock(device, options.threads)
    missed = []
    for model in options.models:
        numbers = sum(torch.Size(shape).numel() for shape in MODELS[model]())
        print(
            f"\n{model}: {numbers:,} numbers, {options.threads} threads, {device}, torch {torch.__version__}"
        )
        columns = f"{'best ms':>8} {'median':>8} {'x floor':>8} {'medians':>8} {'first CPU s':>12}"
        print(f"{'optimizer':16} {'way':20} {columns}")
        for name in options.optimizers:
            contenders = list(ours(name, model, device, clock, options.engines))
            contenders += others(name, model, device, clock) if options.others else []
            measure(contenders, numbers, device, clock, options.rounds)
            for contender in contenders:
                missed += report(contender, minimum_bytes(name) / AXPY_BYTES, device, model)
            best = min(t for contender in contenders for t in contender.axpys)
            bandwidth = AXPY_BYTES * numbers / best
            print(f"{'':16} {'(axpy)':20} {best * 1e3:8.2f} at best, {bandwidth / 1e9:.1f} GB/s")
    for line in missed:
        print("missed:", line)
    return 1 if missed and options.check else 0


def report(contender: Contender, axpys_in_floor: float, device: torch.device, model: str) -> list[str]:
    """Print one line; returns the bars that it misses."""
    ratio = min(contender.times) / (axpys_in_floor * min(contender.axpys))
    median = statistics.median(contender.times)
    of_medians = median / (axpys_in_floor * statistics.median(contender.axpys))
    note = "  changes gradients" if contender.changes_gradients else ""
    first = contender.first_step_cpu_s
    print(
        f"{contender.name:16} {contender.label:20} {min(contender.times) * 1e3:8.2f} {median * 1e3:8.2f} "
        f"{ratio:8.2f} {of_medians:8.2f} {first:12.1f}{note}",
        flush=True,
    )
    bars = FLAT_BARS if device.type == "cpu" else CUDA_AIMS
    limits = {
        "compiled, flat": bars.get(contender.name),
        "compiled, alone": ALONE_AIMS.get(contender.name),
        "rows, flat": WITHOUT_COMPILER_BAR,
        "rows, alone": WITHOUT_COMPILER_BAR,
    }
    limit = limits.get(contender.label) if model != "resnet20" else None  # its arrays stay in the cache
    missed = []
    if limit is not None and ratio > limit:
        missed.append(
            f"{model} {contender.name} ({contender.label}): {ratio:.2f} times the floor, bar {limit:.2f}"
        )
    if contender.label.startswith("compiled") and first > COMPILE_BAR_S:
        missed.append(f"{model} {contender.name}: first step {first:.1f} CPU-seconds, bar {COMPILE_BAR_S}")
    if contender.label in limits and contender.changes_gradients:
        missed.append(f"{model} {contender.name} ({contender.label}): the step changes gradients")
    return missed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet50", "bert-base"])
    parser.add_argument("--optimizers", nargs="+", choices=list(rules()), default=list(rules()))
    parser.add_argument("--engines", nargs="+", default=["compiled", "rows"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--others", action="store_true", help="also measure timm, pytorch_optimizer and torch"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

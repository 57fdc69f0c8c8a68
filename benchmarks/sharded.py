"""Optimizers over layers that are spread over workers: right, how many messages, how many bytes.

    python benchmarks/sharded.py [--workers 2] [--steps 30]     messages and time of a step, bytes held
    python benchmarks/sharded.py --others [--workers 2]         other libraries' LAMB and LARS beside ours

All on gloo, one thread for each worker. `--others` trains a small network for 20 steps under torch's
`fully_shard` and its older `FullyShardedDataParallel`, and compares with the same optimizer in one process:
the error of all weights over the distance that they moved, which for a correct one is rounding. timm and
pytorch_optimizer take part where they can be imported; AdamW, for which spreading changes nothing, is the
control. Without `--others` a step of our LAMB is timed next to one written tensor by tensor over DTensors.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import optim

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
STEPS = 20  # of the comparison with others


class Messages(TorchDispatchMode):
    """Counts the collectives that are issued."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name
        return func(*args, **(kwargs or {}))


class NaiveLAMB(torch.optim.Optimizer):
    """LAMB tensor by tensor, over DTensors as over any: each norm is then a message of its own."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["t"] += 1
                m = state["m"].mul_(0.9).add_(p.grad, alpha=0.1)
                v = state["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                debias1, debias2 = 1 - 0.9 ** state["t"], 1 - 0.999 ** state["t"]
                u = (m / debias1) / ((v / debias2).sqrt() + 1e-6) + group["weight_decay"] * p
                norms = [_number(p.norm()), _number(u.norm())]
                ratio = norms[0] / norms[1] if all(norms) else 1.0
                p.add_(u, alpha=-group["lr"] * ratio)


def _number(x: Any) -> float:
    return float(x.full_tensor() if hasattr(x, "full_tensor") else x)


def network(width: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())))


def spread(model: nn.Module) -> nn.Module:
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def here(x: Any) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def steps(rank: int, count: int) -> None:
    """Messages and seconds of a step, and what a worker holds."""
    makers: dict[str, Make] = {
        "lockstep LAMB": lambda ps: optim.build("lamb", ps, lr=1e-3),
        "LAMB by tensor": lambda ps: NaiveLAMB(ps, lr=1e-3),
    }
    arms = {}
    for name, make in makers.items():
        model = spread(network(128, 24))
        model(torch.randn(8, 128)).square().sum().backward()
        arms[name] = make(list(model.parameters()))
        arms[name].step()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    messages = {}
    for _ in range(count):
        for name, optimizer in arms.items():
            dist.barrier()
            started = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - started)
    for name, optimizer in arms.items():
        with Messages() as mode:
            optimizer.step()
        messages[name] = mode.count
    if rank == 0:
        print("| 48 tensors | messages | ms |\n| --- | --- | --- |")
        for name in arms:
            print(f"| {name} | {messages[name]} | {1000 * statistics.median(seconds[name]):.2f} |")
        ours, naive = messages.values()
        print(f"messages by tensor / lockstep {naive / ours:.0f}, to be >= 5: {_verdict(naive >= 5 * ours)}")
        ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
        print(f"time by tensor / lockstep, median of pairs: {ratio:.1f}")
    memory(rank)


def memory(rank: int) -> None:
    """Bytes of weights, gradients and state of a worker, over those of one that holds everything."""
    if rank == 0:
        print("\n| | weights | gradients | state |\n| --- | --- | --- | --- |")
    for name in ("adamw", "lamb", "novograd", "sm3", "adafactor"):
        held = []
        for model in (network(256, 4), spread(network(256, 4))):
            optimizer = optim.build(name, list(model.parameters()), lr=1e-3)
            model(torch.randn(8, 256)).square().sum().backward()
            optimizer.step()
            parameters = list(model.parameters())
            states = [
                x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)
            ]
            gradients = [p.grad for p in parameters]
            held.append([sum(here(x).nbytes for x in xs) for xs in (parameters, gradients, states)])
        if rank == 0:
            shares = " | ".join(f"{part:,} of {whole:,}" for whole, part in zip(*held, strict=True))
            print(f"| {name} | {shares} |")


def others(rank: int, workers: int) -> None:
    """The error of each optimizer, spread, against itself in one process."""
    if rank == 0:
        print("| | fully_shard | FullyShardedDataParallel |\n| --- | --- | --- |")
    for name, make in {**_others(), **_ours()}.items():
        told = []
        for wrap in (spread, _fsdp1):
            try:
                told.append(_error(_spread_weights(make, wrap, rank), *_alone(make, workers)))
            except Exception as error:
                told.append(f"{type(error).__name__}: {str(error).splitlines()[0][:60]}")
        if rank == 0:
            print(f"| {name} | {' | '.join(told)} |", flush=True)


def _ours() -> dict[str, Make]:
    return {
        "lockstep LAMB": lambda ps: optim.build("lamb", ps, lr=1e-2),
        "lockstep LARS": lambda ps: optim.build("lars", ps, lr=0.5, weight_decay=1e-4),
        "lockstep Adafactor": lambda ps: optim.build("adafactor", ps, lr=1e-2),
        "lockstep SM3": lambda ps: optim.build("sm3", ps, lr=1e-2),
    }


def _others() -> dict[str, Make]:
    makers: dict[str, Make] = {"torch AdamW (control)": lambda ps: torch.optim.AdamW(ps, lr=1e-3)}
    try:
        from timm.optim import Lamb, Lars  # type: ignore[import-not-found]

        makers["timm Lamb"] = lambda ps: Lamb(ps, lr=1e-2, weight_decay=0.01, max_grad_norm=None)
        makers["timm Lars"] = lambda ps: Lars(ps, lr=0.5, weight_decay=1e-4, momentum=0.9)
    except ImportError:
        pass
    try:
        import pytorch_optimizer  # type: ignore[import-not-found]

        makers["pytorch_optimizer Lamb"] = lambda ps: pytorch_optimizer.Lamb(ps, lr=1e-2, weight_decay=0.01)
        makers["pytorch_optimizer LARS"] = lambda ps: pytorch_optimizer.LARS(ps, lr=0.5, weight_decay=1e-4)
    except ImportError:
        pass
    return makers


def _data(step: int, rank: int) -> Tensor:
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(100 * step + rank))


def _small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 5))


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :5]).square().mean()


def _alone(make: Make, workers: int) -> tuple[list[Tensor], list[Tensor]]:
    """The weights in one process, at the end and at the start."""
    model = _small()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = make(list(model.parameters()))
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(workers):
            _loss(model, _data(step, rank)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], start


def _fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def _spread_weights(make: Make, wrap: Callable[[nn.Module], nn.Module], rank: int) -> list[Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = wrap(_small())
    optimizer = make(list(model.parameters()))
    is_mean = isinstance(model, FullyShardedDataParallel)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = _loss(model, _data(step, rank))
        (loss * dist.get_world_size() if is_mean else loss).backward()
        optimizer.step()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return [p.detach().clone() for p in model.parameters()]
    return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]


def _error(weights: list[Tensor], expected: list[Tensor], start: list[Tensor]) -> str:
    def length(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt()

    error = length(zip(weights, expected, strict=True)) / length(zip(expected, start, strict=True))
    return f"{error:.2%} wrong" if error > 1e-3 else f"{error:.0e}"


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def _work(rank: int, workers: int, store: str, with_others: bool, count: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    if with_others:
        others(rank, workers)
    else:
        steps(rank, count)
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--others", action="store_true", help="compare with other libraries")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        inputs = (given.workers, str(Path(folder) / "store"), given.others, given.steps)
        processes.start_processes(_work, inputs, given.workers, start_method="spawn")


if __name__ == "__main__":
    main()

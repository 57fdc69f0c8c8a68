"""What the workers of `test_sharded.py` do: train a model of awkward shapes under `fully_shard`."""

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from optim.registry import hyperparameters

STEPS = 20


class Awkward(nn.Module):
    """Odd sizes, fewer rows than workers, one row, stacks, a convolution, a tied and a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 10, 3)
        self.embedding = nn.Embedding(37, 19)
        self.output = nn.Linear(19, 37, bias=False)
        self.output.weight = self.embedding.weight
        self.first, self.second, self.head = nn.Linear(20, 33), nn.Linear(33, 17), nn.Linear(17, 1)
        self.row = nn.Parameter(torch.randn(1, 23))
        self.one_stack = nn.Parameter(torch.randn(1, 6, 4) * 0.3)
        self.stack = nn.Parameter(torch.randn(5, 6, 4) * 0.3)
        self.two = nn.Parameter(torch.randn(2, 9, 11) * 0.3)
        self.frozen = nn.Parameter(torch.randn(4, 3), requires_grad=False)

    def forward(self, x):  # [examples, 20]
        y = self.head(torch.tanh(self.second(torch.tanh(self.first(x))))).square().sum()
        images = x.repeat(1, 12)[:, :192].reshape(-1, 3, 8, 8)
        y = y + self.convolution(images).tanh().square().sum() * 0.1
        words = (x[:, :4].abs() * 17).long() % 37
        y = (
            y
            + self.output(self.embedding(words)).logsumexp(-1).sum() * 0.1
            + (self.row * x[:, :1]).sin().sum()
        )
        for stack in (self.one_stack, self.stack, self.two):
            width = stack.shape[-1]
            y = y + torch.einsum("nc,bac->nba", x[:, :width], stack).tanh().square().sum()
        return y + 0 * self.frozen.sum()


def batch(step, number, dtype):
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(1000 * step + number)).to(dtype)


def built(name, options, model, several_groups):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups, rate = [{"params": trained}], options.get("lr", 0.01)
    if several_groups:
        groups = [{"params": trained[0::2], "lr": 2 * rate}, {"params": trained[1::2], "lr": rate / 2}]
        if "weight_decay" in hyperparameters(name):
            groups[1]["weight_decay"] = 0.03
    return optim.build(name, groups, **{**options, "lr": rate})


def alone(name, options, several_groups, workers, dtype):
    """The weights by name after all steps in one process."""
    model = Awkward().to(dtype)
    optimizer = built(name, options, model, several_groups)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(workers):
            model(batch(step, number, dtype)).backward()
        optimizer.step()
    return {
        name: p.detach().float().numpy() if dtype == torch.bfloat16 else p.detach().numpy()
        for name, p in model.named_parameters()
    }


def sharded_model(dtype):
    model = Awkward().to(dtype)
    for module in (model.first, model.second, model):
        fully_shard(module)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


class Collectives(TorchDispatchMode):
    """Notes the collectives that are issued."""

    def __init__(self):
        super().__init__()
        self.issued = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            self.issued.append(name.split(".")[1])
        return func(*args, **(kwargs or {}))


def train_all(settings, dtype):
    """For each (name, options, several groups): weights, the collectives of the last step, bytes of state."""
    results = []
    for name, options, several_groups in settings:
        model = sharded_model(dtype)
        optimizer = built(name, options, model, several_groups)
        for step in range(STEPS):
            optimizer.zero_grad()
            model(batch(step, dist.get_rank(), dtype)).backward()
            with Collectives() as collectives:
                optimizer.step()
        weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        results.append(
            (
                {
                    name: (w.float() if w.dtype == torch.bfloat16 else w).numpy()
                    for name, w in weights.items()
                },
                collectives.issued,
                sum(optim_local(v).nbytes for v in state),
            )
        )
    return results


def optim_local(x):
    return x.to_local() if hasattr(x, "to_local") else x


def stepped(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        for number in range(2):  # the same examples on every worker, so that any number of them sees the same
            (model(batch(step, number, torch.float64)) / dist.get_world_size()).backward()
        optimizer.step()


def save(settings, folder):
    """Train three steps and save with torch.distributed.checkpoint; then three more, whose weights return."""
    results = []
    for number, (name, options) in enumerate(settings):
        model = sharded_model(torch.float64)
        optimizer = built(name, options, model, False)
        stepped(model, optimizer, range(3))
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=f"{folder}/{number}", no_dist=False)
        stepped(model, optimizer, range(3, 6))
        results.append({name: p.full_tensor().detach().numpy() for name, p in model.named_parameters()})
    return results


def load(settings, folder):
    """Load what `save` saved and train its last three steps."""
    results = []
    for number, (name, options) in enumerate(settings):
        model = sharded_model(torch.float64)
        optimizer = built(name, options, model, False)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=f"{folder}/{number}")
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        stepped(model, optimizer, range(3, 6))
        results.append({name: p.full_tensor().detach().numpy() for name, p in model.named_parameters()})
    return results


def relative_error(weights, expected):
    """The worst layer's ‖a - b‖ / ‖b‖."""
    return max(
        np.linalg.norm(weights[name] - b) / max(np.linalg.norm(b), 1e-12) for name, b in expected.items()
    )


def refused(make):
    """The message of the ValueError that making or stepping an optimizer raises; "" where there is none."""
    try:
        optimizer, model = make()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def refusals():
    """What becomes of models that are cut in other ways than `fully_shard` does it by itself."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard

    def made(kind, cut):
        model = nn.Linear(4, 6)
        model = cut(model) or model
        return kind(model.parameters()), model

    def fsdp1(model):
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    def by_columns(model):
        fully_shard(model, shard_placement_fn=lambda p: Shard(p.dim() - 1))

    def replicated_and_cut(model):
        fully_shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts")))

    def two_meshes():
        first, second = nn.Linear(4, 4), nn.Linear(4, 6)
        fully_shard(first)
        fully_shard(second, mesh=DeviceMesh.from_group(dist.new_group([0, 1]), "cpu"))
        model = nn.Sequential(first, second)
        return optim.LAMB(model.parameters()), model

    return [
        refused(lambda: made(optim.LAMB, fsdp1)),
        refused(lambda: made(optim.Lion, fsdp1)),
        refused(lambda: made(optim.LAMB, by_columns)),
        refused(lambda: made(optim.LAMB, replicated_and_cut)),
        refused(two_meshes),
        refused(lambda: made(lambda params: optim.LAMB(params, flatten=True), fully_shard)),
    ]


def average_slowly():
    """The weights after Lookahead's steps over parts and over whole layers."""
    found = []
    for cut in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 5)
        if cut:
            fully_shard(model)
        optimizer = optim.Lookahead(optim.LAMB(model.parameters(), lr=0.1), k=2)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        found.append(model.weight.full_tensor() if cut else model.weight)
    return [w.detach().numpy() for w in found]

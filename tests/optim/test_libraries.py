"""Inside other people's loops optimizers do what they do in a loop by hand, saving and resuming included."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import optim
from tests.optim import cases

pytestmark = pytest.mark.slow

STEPS, BATCH = 8, 4
NAMES = [*cases.OWN, "adamw", "momentum"]
each_name = pytest.mark.parametrize("name", NAMES)
each_maker = pytest.mark.parametrize(
    "make",
    [
        lambda name, params: optim.build(name, params, lr=0.01),
        lambda name, params: optim.Lookahead(optim.build(name, params, lr=0.01), k=3),
        lambda name, params: optim.build(name, params, lr=0.01, flatten=True),
    ],
    ids=["alone", "lookahead", "flat"],
)


class Net(nn.Module):
    """A small net that returns its loss, as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))

    def forward(self, x, y):
        return {"loss": (self.layers(x) - y).square().mean()}


def examples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 6, generator=generator)
    return [{"x": row, "y": row[:2].sin()} for row in x]


def batches():
    rows = examples()
    return [
        {key: torch.stack([row[key] for row in rows[start : start + BATCH]]) for key in ("x", "y")}
        for start in range(0, len(rows), BATCH)
    ]


def by_hand(name, make):
    """Weights after each step of a plain loop."""
    model = Net()
    optimizer = make(name, model.parameters())
    seen = []
    for batch in batches():
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
        seen.append([p.detach().clone() for p in model.parameters()])
    return seen


def equal(model, weights, atol=1e-6):
    for p, reference in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), reference, rtol=1e-5, atol=atol)


class Rows(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(examples())


@each_maker
@pytest.mark.parametrize("name", ["lamb", "adafactor", "adamw", "muon"])
def test_hugging_faces_trainer(name, make, tmp_path):
    transformers = pytest.importorskip("transformers")

    def train(steps, resume=None):
        model = Net()
        optimizer = make(name, model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            max_grad_norm=0.0,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Rows(), optimizers=(optimizer, scheduler)
        )
        if getattr(optimizer, "_flatten", False):  # safetensors refuse weights that share a storage
            trainer.add_callback(Unflatten(transformers, optimizer))
        trainer.train(resume_from_checkpoint=resume)
        return model

    expected = by_hand(name, make)
    equal(train(4), expected[3])
    equal(train(STEPS, str(tmp_path / "out" / "checkpoint-4")), expected[-1])


def Unflatten(transformers, optimizer):  # noqa: N802
    """A callback that moves parameters back before they are saved."""

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            optimizer.unflatten()

        def on_step_begin(self, args, state, control, **kwargs):
            optimizer.flatten()

    return Callback()


@each_maker
@each_name
def test_accelerate(name, make, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def loop(first, last):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        model = Net()
        model, optimizer = accelerator.prepare(model, made := make(name, model.parameters()))
        flat = getattr(made, "_flatten", False)  # which safetensors refuse, to save and to load
        if first:
            if flat:
                made.unflatten()
            accelerator.load_state(str(tmp_path / "state"))
            if flat:
                made.flatten()
        for batch in batches()[first:last]:
            optimizer.zero_grad()
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
        if flat:
            made.unflatten()
        accelerator.save_state(str(tmp_path / "state"))
        return accelerator.unwrap_model(model)

    expected = by_hand(name, make)
    equal(loop(0, 4), expected[3])
    equal(loop(4, STEPS), expected[-1])


@each_maker
@each_name
def test_lightning(name, make, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return make(name, self.net.parameters())

        def train_dataloader(self):
            half = STEPS * BATCH // 2 * self.trainer.current_epoch
            return torch.utils.data.DataLoader(examples()[half : half + STEPS * BATCH // 2], BATCH)

    def fit(epochs, resume=None):
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            reload_dataloaders_every_n_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.net

    expected = by_hand(name, make)
    equal(fit(1), expected[3])
    equal(fit(2, tmp_path / "1.ckpt"), expected[-1])


@each_maker
@each_name
def test_distributed_checkpoint(name, make, tmp_path):
    model = Net()
    optimizer = make(name, model.parameters())
    given = batches()
    for batch in given[:4]:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=str(tmp_path))
    other = copy.deepcopy(model)
    loaded = make(name, other.parameters())
    state = {"optimizer": get_optimizer_state_dict(other, loaded)}
    dcp.load(state, checkpoint_id=str(tmp_path))
    set_optimizer_state_dict(other, loaded, optim_state_dict=state["optimizer"])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.data.copy_(p.data)
    for batch in given[4:]:
        for each, its in ((model, optimizer), (other, loaded)):
            its.zero_grad()
            each(**batch)["loss"].backward()
            its.step()
    equal(other, [p.detach() for p in model.parameters()])


def _ddp(rank, folder, names, flatten):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    results = {}
    for name in names:
        for bucket_view in (False, True):
            model = Net()
            optimizer = optim.build(name, model.parameters(), lr=0.01, flatten=flatten)
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
            for batch in batches():
                optimizer.zero_grad()
                half = {key: x[rank * BATCH // 2 : (rank + 1) * BATCH // 2] for key, x in batch.items()}
                wrapped(**half)["loss"].backward()
                optimizer.step()
            results[name, bucket_view] = [p.detach().clone() for p in model.parameters()]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_data_parallel(flatten, tmp_path):
    mp.spawn(_ddp, (str(tmp_path), NAMES, flatten), nprocs=2)
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        for (name, _), weights in results.items():
            expected = by_hand(name, lambda name, params: optim.build(name, params, lr=0.01))[-1]
            for p, reference in zip(weights, expected, strict=True):
                flips = 0.02 if name == "lion" else 0.0  # a sign of nothing may fall either way: 2 lr
                torch.testing.assert_close(p, reference, rtol=1e-4, atol=1e-5 + flips)


@each_maker
@pytest.mark.parametrize("name", optim.names())
def test_a_compiled_training_step(name, make):
    torch._dynamo.reset()
    model = Net()
    optimizer = make(name, model.parameters())

    @torch.compile
    def step(x, y):
        optimizer.zero_grad()
        loss = model(x, y)["loss"]
        loss.backward()
        optimizer.step()
        return loss

    given = batches()
    step(**given[0])
    step(**given[1])  # with states, and not the first backward pass
    torch._dynamo.utils.counters.clear()
    for batch in given[2:]:
        step(**batch)
    # A compiled pass rounds gradients otherwise, and a division by the root of a few tiny squares shows it.
    equal(model, by_hand(name, make)[-1], atol=1e-5)
    assert not torch._dynamo.utils.counters["stats"]  # nothing was compiled anew

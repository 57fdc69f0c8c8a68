"""The estimate of memory: what a real forward pass keeps, without having made it."""

import pytest
import torch
from torch import nn

from tests.trainer.plans import planned
from tests.trainer.reproducibility import NoisyTask, recipe
from trainer.plan import memory


def kept_by_a_real_pass(task, micro: int) -> int:
    """Bytes of distinct storages, other than the model's, that autograd keeps in a real forward pass."""
    model, kept = task.model(), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    batch = {name: torch.from_numpy(array[:micro]) for name, array in task.arrays.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model, batch)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


@pytest.mark.parametrize("micro", [4, 16])
def test_the_estimate_is_what_a_real_pass_keeps(micro: int):
    chosen = recipe(batch={"size": 80, "micro": micro, "lanes": 5})
    plan = planned(chosen, NoisyTask())
    real = kept_by_a_real_pass(NoisyTask(), micro)
    assert memory.activation_bytes(plan, NoisyTask()) == real


def test_a_wider_micro_batch_keeps_more_and_nothing_is_allocated_for_it():
    class Wide(NoisyTask):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(12, 1 << 20), nn.Linear(1 << 20, 1 << 20), nn.Linear(1 << 20, 5))

    plan = planned(recipe(), Wide())  # 4 TB of weights
    assert memory.activation_bytes(plan, Wide()) > 2 * 4 * (1 << 20) * plan.recipe.batch.micro
    each_worker, disk = (text for _, text in memory.rows(plan, Wide()))
    assert "4.4 TB weights + 4.4 TB gradients" in each_worker
    assert "checkpoints of" in disk
    two = planned(recipe(run={"workers": 2}), Wide())
    other = dict(memory.rows(two, Wide()))["with parallel: fsdp"]
    assert "2.2 TB weights + 2.2 TB gradients + 4.4 TB state" in other


def test_recomputed_blocks_keep_less():
    class Deep(NoisyTask):
        def model(self) -> nn.Module:
            blocks = [nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 12)) for _ in range(4)]
            return nn.Sequential(*blocks, nn.Linear(12, 5))

    whole, less = (
        memory.activation_bytes(planned(recipe(run={"recompute": recompute}), Deep()), Deep())
        for recompute in (False, True)
    )
    assert less < whole / 2


def test_a_model_that_looks_at_its_numbers_says_so():
    class Curious(NoisyTask):
        def loss(self, model, batch):
            loss, count = super().loss(model, batch)
            return (loss if loss.item() > 0 else -loss), count

    (_, text), _ = memory.rows(planned(recipe(), Curious()), Curious())
    assert "activations that could not be estimated (" in text

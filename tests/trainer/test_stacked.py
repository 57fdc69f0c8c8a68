"""Several trainings as one tensor program: each is what it would be alone."""

import pytest
import torch
from torch import nn

import optim
from optim.grouping import group_parameters
from tests.optim.cases import OWN
from trainer.compute.stacked import NotStackable, StackedModels
from trainer.tasks.digits import Digits

STEPS, MODELS, EXAMPLES = 12, 3, 20
ROUNDING = {"muon": 4e-4}  # it orthogonalises in bf16: 2^-8 of the sum of all rates here
TASK = Digits(hidden=24)


def batches(seed=0):
    """Other examples for each training and step."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 17, (STEPS, MODELS, EXAMPLES, 64), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (STEPS, MODELS, EXAMPLES), generator=generator)
    return [{"pixels": p, "label": y} for p, y in zip(pixels, labels, strict=True)]


def models():
    made = []
    for k in range(MODELS):
        torch.manual_seed(k)
        made.append(TASK.model())
    return made


def grouped(name, model, **options):
    hyper = {key: value for key, value in optim.hyperparameters(name).items() if key != "lr"} | options
    return [hyper | group | {"lr": 0.01} for group in group_parameters(model).groups]


def alone(name, model, k, rates, clip_norm, **options):
    """The weights of one training, computed as a plain loop does."""
    groups = grouped(name, model, **options)
    optimizer = optim.build(name, groups, lr=0.01)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        total, count = TASK.loss(model, {key: value[k] for key, value in batch.items()})
        (total / count).backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
    return {key: value.detach() for key, value in model.named_parameters()}


@pytest.mark.parametrize("name", optim.names())
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_each_training_is_what_it_is_alone(name, clip_norm):
    options = {"weight_decay": 0.01} if "weight_decay" in optim.hyperparameters(name) else {}
    rates = [[0.01 * (k + 1) / (step + 1) for step in range(STEPS)] for k in range(MODELS)]
    together = models()
    stack = StackedModels(TASK, together, [grouped(name, model, **options) for model in together], name)
    for step, batch in enumerate(batches()):
        finite = stack.update(stack.backward(batch), [rates[k][step] for k in range(MODELS)], clip_norm)
        assert finite.all()
    for k, model in enumerate(models()):
        expected = alone(name, model, k, rates[k], clip_norm, **options)
        for key, value in together[k].named_parameters():
            atol = ROUNDING.get(name, 2e-6)
            torch.testing.assert_close(value.detach(), expected[key], rtol=2e-4, atol=atol)


@pytest.mark.parametrize("name", ["momentum", "adam", *OWN])
def test_one_that_diverges_leaves_the_others_alone(name):
    def trained(broken):
        together = models()
        stack = StackedModels(TASK, together, [grouped(name, model) for model in together], name)
        finite = []
        for batch in batches():
            if broken:
                with torch.no_grad():
                    next(together[1].parameters()).fill_(torch.inf)
            finite.append(stack.update(stack.backward(batch), [0.01] * MODELS, None).tolist())
        assert finite == [[True, not broken, True]] * STEPS
        return [value.detach().clone() for k in (0, 2) for value in together[k].parameters()]

    for one, other in zip(trained(broken=True), trained(broken=False), strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-6
        )  # infinities take other code: it rounds apart


def test_metrics_are_those_of_each_model():
    together = models()
    stack = StackedModels(TASK, together, [grouped("sgd", model) for model in together], "sgd")
    batch = {key: value[0] for key, value in batches()[0].items()}
    measured = stack.metrics(batch)
    for k, model in enumerate(models()):
        for key, (total, count) in TASK.metrics(model, batch).items():
            assert measured[key][0][k].item() == pytest.approx(total.item(), rel=1e-6)
            assert measured[key][1][k].item() == float(count)


class Changed(Digits):
    """Digits with another model, or another loss."""

    def __init__(self, *layers, per_example=False):
        super().__init__(24)
        self.layers, self.per_example = layers, per_example

    def model(self):
        return nn.Sequential(nn.Linear(64, 24), *(layer() for layer in self.layers), nn.Linear(24, 10))

    def loss(self, model, batch):
        total, count = super().loss(model, batch)
        return (total / float(total) if self.per_example else total), count


def stacked(task):
    together = [task.model() for _ in range(MODELS)]
    stack = StackedModels(task, together, [grouped("sgd", model) for model in together], "sgd")
    if (reason := stack.differs(together, batches()[0])) is not None:
        raise NotStackable(reason)


def test_what_cannot_be_stacked_says_why():
    stacked(Changed(nn.ReLU, nn.GELU))
    with pytest.raises(NotStackable, match="buffers"):
        stacked(Changed(lambda: nn.BatchNorm1d(24)))
    with pytest.raises(NotStackable, match="cannot be mapped over"):
        stacked(Changed(nn.Dropout))
    with pytest.raises(NotStackable, match="cannot be mapped over"):
        stacked(Changed(per_example=True))

"""What follows the batch from one recipe to the same at another batch."""

import pytest

from trainer.plan.carry import RULES, carried, has
from trainer.recipe import loader

RECIPE = """
name: carried
task: {use: trainer.tasks.digits:Digits}
batch: {size: 64, micro: 48, lanes: 4, bn_group: 12}
optimizer: {name: lamb, lr: 0.02, betas: [0.9, 0.99], weight_decay: 0.01}
schedule: {warmup: {steps: 10}}
train: {epochs: 4}
run: {workers: 3}
"""


@pytest.fixture
def values():
    return loader.parse(
        RECIPE.replace("micro: 48", "micro: 16").replace("bn_group: 12", "bn_group: 4")
    ).model_dump(mode="json")


def test_nothing_changes_at_the_recipes_own_batch(values):
    everything = {name: rules[-1] for name, rules in RULES.items()}
    result, changes = carried(values, 64, everything)
    assert result == values
    assert changes == []


def test_averages_keep_their_half_life_in_examples(values):
    result, _ = carried(values, 256, {"beta1": "tokens", "beta2": "tokens"})
    assert result["optimizer"]["betas"] == pytest.approx([0.9**4, 0.99**4])
    smaller, _ = carried(values, 16, {"beta2": "tokens"})
    assert smaller["optimizer"]["betas"] == pytest.approx([0.9, 0.99**0.25])


@pytest.mark.parametrize(("rule", "factor"), [("fixed", 1), ("sqrt", 2), ("linear", 4)])
def test_rate_and_decay_follow_by_a_power_of_the_ratio(values, rule, factor):
    result, _ = carried(values, 256, {"lr": rule, "weight_decay": rule})
    assert result["optimizer"]["lr"] == pytest.approx(0.02 * factor)
    assert result["optimizer"]["weight_decay"] == pytest.approx(0.01 * factor)


def test_a_warm_up_in_steps_keeps_its_examples_if_asked(values):
    assert carried(values, 256, {"warmup": "steps"})[0]["schedule"]["warmup"]["steps"] == 10
    result, changes = carried(values, 160, {"warmup": "examples"})
    assert result["schedule"]["warmup"]["steps"] == 4
    assert "schedule.warmup.steps: 10 becomes 4 (as many examples)" in map(str, changes)


@pytest.mark.parametrize(
    ("batch", "micro", "group", "workers"), [(4, 4, 4, 1), (24, 12, 4, 2), (30, 15, 3, 2), (1024, 16, 4, 3)]
)
def test_what_is_computed_divides_the_batch(values, batch, micro, group, workers):
    result, _ = carried(values, batch, {})
    assert result["batch"] == values["batch"] | {"size": batch, "micro": micro, "bn_group": group}
    assert result["run"]["workers"] == workers
    loader.of_values(result, "carried")  # it is a recipe


def test_the_values_that_were_given_stay(values):
    before = loader.of_values(values, "carried")
    carried(values, 256, {"beta2": "tokens", "weight_decay": "linear"})
    assert loader.of_values(values, "carried") == before


def test_what_a_recipe_lacks_is_left_out(values):
    values["schedule"]["warmup"] = None
    assert not has(values, "momentum")
    assert not has(values, "warmup")
    result, changes = carried(values, 128, {"momentum": "tokens", "warmup": "steps"})
    assert result["optimizer"] == values["optimizer"]
    assert {change.key for change in changes} == {"batch.size"}

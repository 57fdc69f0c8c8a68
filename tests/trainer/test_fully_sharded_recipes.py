"""The recipes that ship, spread over workers: the bits of one worker, for networks of every kind."""

from pathlib import Path
from typing import Any

import pytest

from data_echo import InlinePreparer
from tests.trainer.process_group import ProcessGroup
from trainer.build import build
from trainer.distributed.group import WorkerGroup
from trainer.loop import steps
from trainer.plan.inputs import Inputs
from trainer.plan.plan import resolve
from trainer.recipe import loader
from trainer.task import load

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DATA = {"quickstart": None, "shakespeare": "tinyshakespeare/input.txt", "cifar10_quick": "cifar10"}


def losses(name: str, data: str | None, *overrides: str) -> list[float]:
    """The losses of a recipe's first 8 steps, in exact arithmetic."""
    given = (() if data is None else (f"task.with.path={data}",)) + overrides
    recipe = loader.parse((CONFIGS / f"{name}.yaml").read_text(), name, ("run.reduction=exact", *given))
    task: Any = load(recipe.task)
    plan, group = resolve(recipe, Inputs.of(recipe, task)), WorkerGroup.join("cpu")
    training = build(plan, task, group, InlinePreparer(task, recipe.seed))
    return [step.loss for step, _ in zip(steps(training), range(8), strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_a_recipe_that_ships_is_bitwise_the_same_in_every_mode(
    process_group: ProcessGroup, request: pytest.FixtureRequest, name: str
):
    data = DATA[name] and str(request.getfixturevalue("shared_data") / DATA[name])
    alone = process_group.run(1, losses, name, data, "run.workers=1")[0]
    for workers, parallel in ((2, "fsdp"), (3, "fsdp"), (2, "{ddp: {shard_state: true}}")):
        mode = (f"run.workers={workers}", f"run.parallel={parallel}")
        assert process_group.run(workers, losses, name, data, *mode)[0] == alone

"""Recommendations: the recipe for another batch, its reasons and forecast, and what chooses the batch."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cluster.experiments.promises import promises
from cluster.experiments.recommend import Wish, choose, recommend
from cluster.experiments.trials import Study
from tests.cluster.commands import run
from tests.cluster.experiments import digits_study
from trainer.errors import UserError
from trainer.recipe import loader
from trainer.recipe.schema import Recipe

_RECIPE = """
name: digits
task: {{use: trainer.tasks.digits:Digits, with: {{hidden: 128}}}}
batch: {{size: 64, micro: 16, lanes: 64}}
optimizer: {{name: {name}, lr: 0.1}}
train: {{epochs: 60}}
{more}
"""


@cache
def _recipes(more: str = "") -> dict[str, Any]:
    return {
        name: loader.parse(_RECIPE.format(name=name, more=more)).model_dump(mode="json")
        for name in digits_study.OPTIMIZERS
    }


def _study(tmp_path: Path, more: str = "", **told: Any) -> Study:
    return Study.read(digits_study.folder(tmp_path, {"recipes": _recipes(more)} | told))


def _advised(study: Study, **wish: Any) -> tuple[Recipe, str]:
    text = recommend(study, Wish.of(**wish))
    return loader.parse(text), text


def test_a_recipe_for_a_batch_that_was_not_tried(tmp_path: Path):
    study = _study(tmp_path)
    recipe, told = _advised(study, batch=384)
    assert recipe.batch.size == 384
    assert recipe.optimizer.name == "adam"  # which needs the fewest steps there
    law = digits_study.digits()["adam"].rate_laws["peaked"]
    assert recipe.optimizer.lr == pytest.approx(float(law.rates(384)), rel=1e-3)
    assert recipe.schedule.scale.rule == "none"
    assert (recipe.train.target.metric, recipe.train.target.at_most) == ("loss", 0.2)
    (promise,) = promises(study.folder)
    assert recipe.name == promise.run
    assert promise.id in told
    measured = digits_study.digits()["adam"].steps_law.steps(384)
    assert promise.steps.low < measured < promise.steps.high
    assert recipe.train.steps == pytest.approx(2 * promise.steps.high, abs=1)
    assert promise.seconds is not None


def test_the_best_rate_of_a_batch_that_was_tried_is_kept(tmp_path: Path):
    recipe, told = _advised(_study(tmp_path), batch=128, arm="momentum")
    point = next(p for p in digits_study.digits()["momentum"].points if p.batch == 128)
    assert recipe.optimizer.lr == pytest.approx(point.rate)
    assert "the best found at this batch" in told


def test_beyond_the_batches_tried_the_rate_saturates_with_the_steps(tmp_path: Path):
    """From batches up to 64 a power of the batch asks for up to ten times the rate that is best at 512."""
    lines = [line for line in digits_study.lines() if line.get("batch", 0) <= 64]
    lines[0] |= {"recipes": _recipes(), "batches": [4, 8, 16, 32, 64]}
    study = Study.of(tmp_path, lines)
    for name, curve in digits_study.digits().items():
        best = next(point.rate for point in curve.points if point.batch == 512)
        recipe, told = _advised(study, batch=512, arm=name)
        assert 0.6 < recipe.optimizer.lr / best < 2.3
        assert "beyond the batches tried" in told


def test_what_follows_the_batch_goes_by_the_sweeps_rules(tmp_path: Path):
    more = "schedule: {warmup: {steps: 8}}"
    study = _study(tmp_path, more, carry={"beta2": "tokens", "warmup": "examples"})
    recipe, told = _advised(study, batch=256, arm="adam")
    assert recipe.optimizer.hyper["betas"] == pytest.approx((0.9, 0.999**4))
    assert recipe.schedule.warmup.steps == 2
    assert "schedule.warmup.steps: 8 becomes 2 (as many examples)" in told


def test_a_decaying_rate_keeps_the_trials_length(tmp_path: Path):
    recipe, _ = _advised(_study(tmp_path, "schedule: {decay: {shape: cosine}}"), batch=256)
    assert recipe.train.epochs == 60


def test_the_same_wish_gives_the_same_recipe_and_one_forecast(tmp_path: Path):
    study = _study(tmp_path)
    assert _advised(study, batch=300) == _advised(study, batch=300)
    assert len(promises(study.folder)) == 1


def test_far_beyond_what_was_tried_one_more_trial_is_proposed(tmp_path: Path):
    _, near = _advised(_study(tmp_path), batch=2048)
    assert "First try" not in near
    _, far = _advised(_study(tmp_path / "far"), batch=16384)
    found = re.search(
        r"First try batch (\S+): .*interval of steps from x(\S+) to x(\S+)", " ".join(far.split())
    )
    assert found
    assert 1024 < int(found[1].replace(",", "")) <= 16384
    assert float(found[3]) < float(found[2])


def test_workers_choose_the_batch(tmp_path: Path):
    recipe, _ = _advised(_study(tmp_path), workers=4)
    assert recipe.run.workers == 4
    assert recipe.batch.size % (4 * 16) == 0
    chosen, _ = choose(_study(tmp_path / "again"), Wish(workers=4))
    fewest = digits_study.digits()["adam"].steps_law.e_min
    assert chosen.examples.median <= 2.6 * fewest


def test_a_deadline_is_kept_with_the_fewest_examples_and_a_budget_in_the_fewest_steps(tmp_path: Path):
    study = _study(tmp_path)
    easy, _ = choose(study, Wish(workers=1, deadline=3600))
    assert easy.batch == 16
    tight = choose(study, Wish(workers=1, budget=6000))[0]
    assert tight.examples.high <= 6000
    assert choose(study, Wish(workers=1, budget=12_000))[0].steps.median < tight.steps.median


def test_chances_are_told_where_the_batch_is_given(tmp_path: Path):
    _, told = _advised(_study(tmp_path), batch=256, deadline="1h", budget=10)
    assert "within 60 min with a chance of 100%" in told
    assert "within 10 examples with a chance of 0%" in told


def test_a_prior_can_come_from_a_published_table(tmp_path: Path):
    study = _study(tmp_path)
    own, _ = choose(study, Wish(batch=512, arm="momentum"))
    told, _ = choose(study, Wish(batch=512, arm="momentum", prior="resnet50-lars"))
    assert own.steps.median != told.steps.median


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "give --batch B or --workers N"),
        ({"batch": 8, "prior": "resnet"}, "--prior resnet: is no table; did you mean resnet50-lars"),
        ({"batch": 8, "deadline": "soon"}, "--deadline soon: is no time; write it as 90s"),
        ({"batch": 8, "deadline": "0s"}, "--deadline 0s: is no time"),
        ({"batch": 8, "arm": "adagrad"}, "has no arm adagrad .* its arms are sgd, momentum"),
        ({"workers": 5000}, r"--workers 5000: .* a batch of 80,000 or more, and the sweep reached 1,024"),
        ({"workers": 2, "budget": 5}, "no batch keeps within what was asked for"),
    ],
)
def test_what_cannot_be_recommended_is_refused(tmp_path: Path, wish: dict, message: str):
    study = _study(tmp_path)
    with pytest.raises(UserError, match=message):
        recommend(study, Wish.of(**wish))
    assert not promises(study.folder)


def test_a_recommended_recipe_trains_and_its_forecast_is_graded(tmp_path: Path):
    """From the command to the report: the trainer's digits follow the law that the study found."""
    study = _study(tmp_path / "runs")
    advised = run("recommend", "digits", "--batch", "384", cwd=tmp_path)
    assert advised.process.returncode == 0, advised.output
    (tmp_path / "next.yaml").write_text(advised.output)
    trained = run("train", "next.yaml", "--local", "--set", "track.uri=none", cwd=tmp_path)
    assert trained.process.returncode == 0, trained.output
    (promise,) = promises(study.folder)
    for told in (run("report", "digits", cwd=tmp_path), run("report", promise.run, cwd=tmp_path)):
        assert told.process.returncode == 0, told.output
        assert re.search(
            rf"{promise.id}  adam batch=384 .* \d+ +(held|missed) .* {promise.run}-001", told.output
        )


def test_commands_refuse_with_exit_code_2(tmp_path: Path):
    for arguments in (["report", "nothing"], ["recommend", "nothing", "--batch", "8"], ["report"]):
        command = run(*arguments, cwd=tmp_path)
        assert command.process.returncode == 2, command.output

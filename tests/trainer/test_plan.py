"""The plan: what a recipe derives, against arithmetic done by hand and by walking the run."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from data_echo import ArraySource
from tests.trainer.plans import planned
from trainer.errors import RecipeError
from trainer.plan import plan, report
from trainer.recipe import loader as recipes
from trainer.recipe.schema import Recipe


class Points:
    """A task of `n` training points and a model of 3 × 5 weights and 5 biases."""

    def __init__(self, n: int = 1000, held_out: int = 100):
        self.lengths = {"train": n, "validation": held_out, "test": held_out}

    def model(self) -> nn.Module:
        return nn.Linear(3, 5)

    def source(self, split: str) -> ArraySource:
        return ArraySource({"x": np.zeros((self.lengths[split], 3), np.float32)})


def recipe(*overrides: str) -> Recipe:
    text = """\
name: planned
task: {use: "a:B"}
batch: {size: 96, micro: 8, lanes: 8}
optimizer: {name: lamb, lr: 0.02}
schedule: {scale: {rule: sqrt, base_batch: 24}, warmup: {epochs: 2}}
echo: {factor: 2}
train: {epochs: 10}
"""
    return recipes.parse(text, "r.yaml", overrides)


def refusal(*overrides: str, task: object = None) -> str:
    with pytest.raises(RecipeError) as error:
        planned(recipe(*overrides), task or Points())
    return str(error.value)


def test_a_plan_by_hand():
    made = planned(recipe("run.workers=3"), Points())
    assert made.examples == {"train": 1000, "validation": 100, "test": 100}
    assert (made.micro_batches, made.micro_batches_at(5000), made.most_micro_batches) == (12, 12, 12)
    assert made.total_examples == 10_000
    assert (made.steps, made.served_examples) == (105, 10_080)
    assert made.peak_lr == pytest.approx(0.04)
    assert made.warmup_examples == 2000
    assert made.parameters == 20
    assert made.state_bytes == 2 * 4 * 20  # LAMB's two moments, fp32
    assert made.largest_workers == 8
    # Half of what is served is fresh, but for the copies that still wait at the end (at most the capacity).
    assert 10_080 / 2 <= made.fresh_examples <= 10_080 / 2 + 64


def test_growth_is_walked_stage_by_stage():
    growth = "batch.growth={shape: multiply, at: [{epochs: 4}, {epochs: 7}], factor: 2, max: 384}"
    made = planned(recipe(growth), Points())
    served = steps = 0
    while served < made.total_examples:
        batch = 8 * made.micro_batches_at(served)
        assert batch == (96 if served < 4000 else 192 if served < 7000 else 384)
        served, steps = served + batch, steps + 1
    assert (made.steps, made.served_examples, made.most_micro_batches) == (steps, served, 48)
    assert "192 from 4,000 on" in "\n".join(report.lines(made))


@settings(deadline=None)
@given(k=st.integers(1, 40), lanes=st.integers(1, 40), workers=st.integers(1, 9))
def test_the_busiest_workers_part_is_what_the_lanes_give(k, lanes, workers):
    largest = []
    for step in range(lanes):
        done = [0] * workers
        for j in range(step * k, (step + 1) * k):
            done[(j % lanes) % workers] += 1
        largest.append(max(done))
    assert plan.busiest_worker(k, lanes, workers) == pytest.approx(sum(largest) / (k * lanes))
    assert plan.busiest_worker(k, lanes, 1) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["batch.size=1008"],
            "--set: batch.size: is 1008, and there are 1000 training examples; the largest that fits is 1000",
        ),
        (["batch={size: 2000, micro: 2000}"], "micro 2000 does not fit either"),
        (
            ["batch.growth={shape: steps, at: [{epochs: 1}], sizes: [1200]}"],
            "--set: batch.growth: grows to 1200, and there are 1000 training examples; the largest that",
        ),
        (
            ["batch.growth={shape: steps, at: [{epochs: 10}], sizes: [192]}"],
            "--set: batch.growth: its stages begin at examples 0, 10000 of 10000; let each begin after",
        ),
        (
            ["batch.shuffle.block=1001"],
            "--set: batch.shuffle.block: is 1001, and there are 1000 training examples; give the rows",
        ),
        (["optimizer.no_decay=[head.*]"], "--set: optimizer.no_decay: "),
        (
            ["init.freeze=[head.*]"],
            "--set: init.freeze: head.* matches none of the model's parameters; they are weight, bias",
        ),
        (
            ["init.zero=[wait]"],
            "--set: init.zero: wait matches none of the model's parameters; they are weight",
        ),
        (["run.recompute=true"], "--set: run.recompute: true finds no block of the model; its modules are"),
        (["run.recompute=[x.*]"], "--set: run.recompute: x.* finds no block of the model; its modules are"),
        (["run.channels_last=true"], "--set: run.channels_last: is true, and the model has no convolution"),
        (["init.freeze=['*']"], "--set: init.freeze: leaves no parameter to train; freeze fewer"),
        (
            ["schedule.warmup.epochs=11"],
            "--set: schedule.warmup.epochs: takes 11000 of 10000 examples; let it end before",
        ),
    ],
)
def test_what_contradicts_the_data_or_the_model_is_refused(overrides, message):
    assert message in refusal(*overrides)


def test_rows_may_be_shuffled_in_blocks():
    in_blocks = recipe("batch.shuffle={block: 50, window: 4}", "echo.factor=1")
    made = planned(in_blocks, Points())
    assert "blocks of 50 rows permuted, rows shuffled among 4 blocks (200 rows)" in "\n".join(
        report.lines(made)
    )

    def served(chosen: Recipe) -> np.ndarray:
        order = plan.echo_schedule(chosen, 1000)
        return np.stack([order.micro_batch(j).index for j in range(120)]).reshape(15, 64)  # rounds of 8 lanes

    def blocks_in_a_round(chosen: Recipe) -> list[int]:
        return [len(np.unique(row // 50)) for row in served(chosen)]

    assert max(blocks_in_a_round(in_blocks)) <= 8  # two windows, where one ends
    assert min(blocks_in_a_round(recipe("echo.factor=1"))) > 12


class InRowGroups(ArraySource):
    def rows_together(self) -> int:
        return 50


class Large(Points):
    def source(self, split: str) -> ArraySource:
        return InRowGroups({"x": np.zeros((self.lengths[split], 3), np.float32)})


def test_a_source_that_reads_many_rows_at_once_is_told_of():
    hint = "all rows permuted; read by 50: batch.shuffle.block 50 is cheaper"
    assert hint in "\n".join(report.lines(planned(recipe(), Large())))
    assert "cheaper" not in "\n".join(report.lines(planned(recipe("batch.shuffle.block=50"), Large())))


class Silent(Points):
    def source(self, split: str) -> ArraySource:
        if split == "train":
            raise OSError("the disk is gone")
        return super().source(split)


class Modelless(Points):
    def model(self) -> nn.Module:
        raise ValueError("no such size; take another")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Points(held_out=0), "r.yaml:2: task: the validation split of a:B is empty; give it examples"),
        (Silent(), "r.yaml:2: task: source('train') of Silent raised OSError: the disk is gone (tests/"),
        (
            Modelless(),
            "r.yaml:2: task: model() of Modelless raised ValueError: no such size; take another (tests/",
        ),
    ],
)
def test_what_the_task_cannot_give_is_refused(task, message):
    assert message in refusal(task=task)


class Peeking(Points):
    def model(self) -> nn.Module:
        model = super().model()
        assert model.weight.abs().max().item() < 10  # impossible on the meta device
        return model


def test_a_model_that_looks_at_its_numbers_is_planned_too():
    assert planned(recipe(), Peeking()).parameters == 20


class Enormous(Points):
    def model(self) -> nn.Module:
        return nn.Linear(1_000_000, 1_000_000)  # 4 TB


def test_no_memory_is_taken_for_the_model_or_its_state():
    made = planned(recipe(), Enormous())
    assert made.state_bytes == 8 * made.parameters == 8 * (10**12 + 10**6)


def test_planning_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    planned(recipe(), Peeking())
    assert torch.equal(before, torch.get_rng_state())


def test_the_lines_say_everything_on_one_screen():
    lines = report.lines(planned(recipe("run.workers=3"), Points()))
    text = "\n".join(lines)
    for fact in [
        "planned: a:B, seed 0",
        "20 parameters: 80 B of weights, 160 B of lamb state",
        "96 = 12 micro-batches of 8 from 8 lanes",
        "3 of at most 8; the busiest computes 42% of each step",
        "0.04 = 0.02 scaled from batch 24 by rule sqrt",
        "linear over 2,000 examples (2 epochs)",
        "105, serving 10,080 examples (10.08 epochs)",
        "1,000 train, 100 validation, 100 test",
        "echo × 2 (of 64 examples)",
    ]:
        assert fact in text
    assert len(lines) <= 14
    assert max(map(len, lines)) <= 110
    assert len({line.index("  ") <= 14 for line in lines}) == 1


def test_a_number_of_workers_that_may_change_is_shown_with_the_share_of_the_busiest_of_the_most():
    plan = planned(recipe("run.workers={min: 1, max: 3}"), Points())
    (line,) = [line for line in report.lines(plan) if line.startswith("workers")]
    assert "1 to 3 of at most 8; the busiest of 3 computes 42% of each step" in line


def test_a_long_run_is_planned_at_once():
    """A billion examples: nothing may walk step by step. The bound is a thousandth of what walking takes."""
    started = time.process_time()
    planned(recipe("train.epochs=1000000", "echo.factor=1.5"), Points())
    assert time.process_time() - started < 20


class Tied(Points):
    """A model with a parameter of no dimension, and one that two modules share."""

    def __init__(self, scalar: bool = False):
        super().__init__()
        self.scalar = scalar

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 5))
        model[1].weight = model[0].weight
        if self.scalar:
            model.register_parameter("gain", nn.Parameter(torch.ones(())))
        return model


def test_what_cannot_be_spread_by_rows_is_refused():
    assert "gain of shape () has no rows" in refusal("run.parallel=fsdp", task=Tied(scalar=True))
    tied = refusal('run.parallel={fsdp: {units: ["0"]}}', task=Tied())
    assert "0.weight and 1.weight are one parameter in two units" in tied
    assert "units: 9 finds no module" in refusal('run.parallel={fsdp: {units: ["9"]}}', task=Tied())
    assert planned(recipe("run.parallel=fsdp"), Tied()).parameters == 9 + 3 + 3 + 20

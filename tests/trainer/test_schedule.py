"""Learning rate and batch against closed forms written independently, at every step of random runs."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainer.plan.schedules import BatchStages, LearningRate, in_examples, scaled
from trainer.recipe import loader as recipes
from trainer.recipe.schema import Recipe

LR = 0.3


def recipe(schedule: str = "{}", growth: str = "null", size: int = 32, micro: int = 8) -> Recipe:
    return recipes.parse(
        f"""
name: run
task: {{use: "a:B"}}
batch: {{size: {size}, micro: {micro}, growth: {growth}}}
optimizer: {{name: sgd, lr: {LR}}}
schedule: {schedule}
train: {{epochs: 1}}
"""
    )


def rates(schedule: str, total: int, epoch: int, size: int = 32) -> list[float]:
    rate = LearningRate(recipe(schedule, size=size), epoch, total)
    return [rate.rate(served, size) for served in range(0, total, size)]


runs = {
    "epoch": st.integers(1, 2000),
    "total": st.integers(40, 3000),
    "warmup": st.integers(0, 1500),
    "end": st.sampled_from([0.0, 0.01, 0.25, 1.0]),
}


def closed_form(served: int, size: int, total: int, warmup: int, up, down) -> float:
    """Warm-up at the step's end, decay at its start, in examples."""
    after, left = served + size, total - warmup
    warmth = up(Fraction(after, warmup)) if after < warmup else 1.0
    fall = down(Fraction(served - warmup, left)) if served > warmup and left > 0 else down(Fraction(0))
    return LR * warmth * fall


@settings(deadline=None, max_examples=60)
@given(**runs, power=st.sampled_from([0.5, 1.0, 2.0]), start=st.sampled_from([0.0, 0.2]))
def test_polynomials_up_and_down(epoch, total, warmup, end, power, start):
    assume(warmup < total)
    got = rates(
        f"{{warmup: {{examples: {warmup}, shape: polynomial, power: {power}, start: {start}}},"
        f" decay: {{shape: polynomial, power: {power}, end: {end}}}}}",
        total,
        epoch,
    )
    want = [
        closed_form(
            served,
            32,
            total,
            warmup,
            up=lambda r: float(r) ** power * (1 - start) + start,
            down=lambda p: (1 - end) * float(1 - min(p, 1)) ** power + end,
        )
        for served in range(0, total, 32)
    ]
    assert got == pytest.approx(want, rel=1e-12, abs=1e-15)


@settings(deadline=None, max_examples=60)
@given(**runs, start=st.sampled_from([0.0, 0.2]))
def test_cosines_up_and_down(epoch, total, warmup, end, start):
    assume(warmup < total)
    got = rates(
        f"{{warmup: {{examples: {warmup}, shape: cosine, start: {start}}},"
        f" decay: {{shape: cosine, end: {end}}}}}",
        total,
        epoch,
    )
    want = [
        closed_form(
            served,
            32,
            total,
            warmup,
            up=lambda r: start + (1 - start) * math.sin(math.pi * float(r) / 2) ** 2,
            down=lambda p: end + (1 - end) * math.cos(math.pi * float(p) / 2) ** 2,
        )
        for served in range(0, total, 32)
    ]
    assert got == pytest.approx(want, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    **runs, start=st.sampled_from([0.01, 0.5]), factor=st.sampled_from([0.5, 0.981]), hold=st.integers(0, 500)
)
def test_exponentials_up_and_down(epoch, total, warmup, end, start, factor, hold):
    got = rates(
        f"{{warmup: {{examples: {warmup}, shape: exponential, start: {start}}},"
        f" decay: {{shape: exponential, factor: {factor}, hold: {{examples: {hold}}}, end: {end}}}}}",
        total,
        epoch,
    )
    want = []
    for served in range(0, total, 32):
        up = math.exp(math.log(start) * (1 - (served + 32) / warmup)) if served + 32 < warmup else 1.0
        epochs = max(0, served - warmup - hold) / epoch
        want.append(LR * up * max(end, math.exp(epochs * math.log(factor))))
    assert got == pytest.approx(want, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(total=runs["total"], milestones=st.lists(st.integers(0, 3000), min_size=1, max_size=4))
def test_steps_down_and_a_constant_warm_up(total, milestones):
    at = ", ".join(f"{{examples: {milestone}}}" for milestone in milestones)
    warmup, decay = (
        "{examples: 100, shape: constant, start: 0.1}",
        f"{{shape: step, at: [{at}], factor: 0.5}}",
    )
    want = [
        LR * (0.1 if served + 32 < 100 else 1.0) * 0.5 ** len([m for m in milestones if m <= served])
        for served in range(0, total, 32)
    ]
    got = rates(f"{{warmup: {warmup}, decay: {decay}}}", total, 100)
    assert got == pytest.approx(want, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(total=runs["total"], share=st.sampled_from([0.1, 0.2, 1.0]), shape=st.sampled_from(["linear", "sqrt"]))
def test_warm_up_stable_decay(total, share, shape):
    length = round(share * total)
    got = rates(f"{{cooldown: {{share: {share}, shape: {shape}, end: 0.1}}}}", total, 100)
    for served, rate in zip(range(0, total, 32), got, strict=True):
        progress = max(0.0, 1 - (total - served) / length)
        fall = 1 - (progress if shape == "linear" else progress**0.5)
        assert rate == pytest.approx(LR * (0.1 + 0.9 * fall), rel=1e-9)


def test_a_cool_down_multiplies_the_decay():
    decay = rates("{decay: {shape: cosine}}", 640, 100)
    both = rates("{decay: {shape: cosine}, cooldown: {examples: 320}}", 640, 100)
    cooling = rates("{cooldown: {examples: 320}}", 640, 100)
    assert both == pytest.approx([a * b / LR for a, b in zip(decay, cooling, strict=True)])


def test_every_step_moves_and_the_first_full_one_has_the_full_rate():
    got = rates("{warmup: {steps: 5}, decay: {shape: polynomial}}", 640, 100)
    assert got[0] == pytest.approx(LR / 5)
    assert got[4] == LR
    assert got[5] == LR  # the decay counts from the end of warm-up
    assert got[-1] == pytest.approx(LR / 15)


def test_mlperf_s_form_is_stretched_over_one_step_more():
    """MLPerf: end + (base - end) (1 - (t - W) / (T - W + 1)) ** p at step t of T."""
    warmup, steps = 5, 20
    got = rates("{warmup: {steps: 5}, decay: {shape: polynomial, power: 2, plus_one: true}}", 32 * steps, 100)
    want = [LR * (1 - (t - warmup) / (steps - warmup + 1)) ** 2 for t in range(warmup, steps)]
    assert got[warmup:] == pytest.approx(want)


@pytest.mark.parametrize(
    ("rule", "factor"), [("none", 1), ("linear", 8), ("sqrt", math.sqrt(8)), ("power, power: 0.75", 8**0.75)]
)
def test_scaling_rules(rule, factor):
    scale = recipe(f"{{scale: {{rule: {rule}, base_batch: 4}}}}").schedule.scale
    assert scaled(scale, LR, 32) == pytest.approx(LR * factor)
    assert scaled(scale, LR, 4) == LR


@pytest.mark.parametrize(
    ("length", "examples"),
    [("examples: 77", 77), ("epochs: 1.5", 150), ("steps: 3", 96), ("share: 0.25", 250)],
)
def test_lengths_in_every_unit(length, examples):
    warmup = recipe(f"{{warmup: {{{length}}}}}").schedule.warmup
    assert warmup is not None
    assert in_examples(warmup, examples_per_epoch=100, total_examples=1000, batch_size=32) == examples


def walk(stages: BatchStages, total: int) -> list[tuple[int, int]]:
    """(examples served before, batch) of each step, one after the other."""
    steps, served = [], 0
    while served < total:
        steps.append((served, stages.at(served).batch_size))
        served += steps[-1][1]
    return steps


@settings(deadline=None)
@given(
    total=st.integers(1, 5000),
    starts=st.lists(st.integers(1, 5000), max_size=4, unique=True).map(sorted),
    data=st.data(),
)
def test_steps_of_a_list_of_stages(total, starts, data):
    sizes = data.draw(
        st.lists(st.integers(1, 30).map(lambda k: 8 * k), min_size=len(starts), max_size=len(starts))
    )
    growth = "null"
    if starts:
        at = ", ".join(f"{{examples: {start}}}" for start in starts)
        growth = f"{{shape: steps, at: [{at}], sizes: {sizes}}}"
    stages = BatchStages(recipe(growth=growth), 100, total)
    steps = walk(stages, total)
    assert stages.steps(total) == (len(steps), sum(steps[-1]))
    for served, batch in steps:
        begun = [size for start, size in zip(starts, sizes, strict=True) if start <= served]
        assert batch == (begun[-1] if begun else 32)


def test_a_ramp_rises_in_equal_stretches():
    stages = BatchStages(
        recipe(growth="{shape: ramp, start: 8, increment: 8, over: {share: 0.6}}"), 100, 1000
    )
    assert [(stage.start, stage.batch_size) for stage in stages.stages] == [
        (0, 8),
        (200, 16),
        (400, 24),
        (600, 32),
    ]


def test_a_batch_at_its_maximum_passes_its_milestones_on_to_the_rate():
    growth = "{shape: multiply, at: [{epochs: 1}, {epochs: 2}, {epochs: 3}], factor: 5, max: 320}"
    grown = recipe(growth=growth)
    rate, stages = LearningRate(grown, 1000, 4000), BatchStages(grown, 1000, 4000)
    for served, batch, share in [(0, 32, 1), (1000, 160, 1), (2000, 320, 2 / 5), (3999, 320, 2 / 25)]:
        assert stages.at(served).batch_size == batch
        assert rate.rate(served, batch) == pytest.approx(LR * share)
        # Smith et al.: the noise scale, rate over batch, falls as it would with the decay alone.
        assert rate.rate(served, batch) / batch == pytest.approx(LR / 32 / 5 ** (served // 1000))


def test_growth_changes_nothing_but_the_batch():
    schedule = "{warmup: {epochs: 1}, decay: {shape: cosine}}"
    plain = LearningRate(recipe(schedule), 1000, 4000)
    grown = LearningRate(recipe(schedule, "{shape: multiply, at: [{epochs: 2}], factor: 4}"), 1000, 4000)
    for served in range(0, 4000, 32):
        assert grown.rate(served, 32) == plain.rate(served, 32)

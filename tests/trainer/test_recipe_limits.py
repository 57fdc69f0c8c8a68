"""What no recipe should hold: it is refused with its key, at once and within little memory."""

import os
import random
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_echo import ArraySource
from tests.trainer.plans import planned
from trainer.errors import RecipeError, UserError
from trainer.plan import plot, report
from trainer.plan.plan import busiest_worker
from trainer.recipe import loader as recipes
from trainer.recipe.batch import divisors
from trainer.recipe.schema import SECTIONS

MOST_OPERATIONS = 6_000_000  # lines of Python: what no recipe's reading and planning comes near
MOST_BYTES = 512 << 20  # of memory beyond what was used before


class Points:
    """A task of 1000 training points and a small model."""

    def model(self):
        from torch import nn

        return nn.Linear(3, 5)

    def source(self, split: str) -> ArraySource:
        return ArraySource({"x": np.zeros((1000 if split == "train" else 100, 3), np.float32)})


WHOLE = """\
name: whole
seed: 0
task: {use: "some.module:Task", with: {hidden: 8, rate: 0.1, names: [a, b]}}
init: {from: null, zero: [], freeze: []}
batch: {size: 96, micro: 8, lanes: 8, shuffle: {block: 1, window: 16}}
optimizer: {name: lamb, lr: 0.02, weight_decay: 0.01, betas: [0.9, 0.99], lr_multipliers: {weight: 2}}
schedule:
  scale: {rule: power, base_batch: 24, power: 0.5}
  warmup: {epochs: 2, shape: polynomial, power: 2}
  decay: {shape: step, at: [{epochs: 4}, {share: 0.8}], factor: 0.5}
  cooldown: {steps: 3}
echo: {factor: 2, cap: 4, at: before_augment, capacity: 96}
train:
  epochs: 10
  clip_norm: 1
  average: {kind: swa, start: {share: 0.5}, every: {steps: 2}}
  budget: {minutes: 3}
eval: {every: {epochs: 1}}
checkpoint: {every: {minutes: 1}, keep: 3, best: {metric: loss, mode: min}, dir: runs, mirror: mirror}
run: {workers: 2, pool: {min: 1, max: 2}, stack: 4}
track: {uri: "sqlite:///x.db", experiment: default}
"""
VARIANTS = [
    "schedule.decay={shape: exponential, factor: 0.9, every: {epochs: 1}, hold: {epochs: 1}}",
    "schedule.decay={shape: polynomial, power: 2, end: 0.1, plus_one: true}",
    "batch.growth={shape: multiply, at: [{epochs: 4}, {epochs: 7}], factor: 2, max: 384}",
    "batch.growth={shape: ramp, start: 16, increment: 16, over: {share: 0.5}}",
    "batch.growth={shape: steps, at: [{epochs: 1}], sizes: [192]}",
    "echo={factor: auto, cap: 3, max_age: 5000}",
]
ODD = [
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**12,
    10**12 + 1,
    1000000000039,
    10**300,
    -(10**18),
    0.0,
    1e-320,
    1e-9,
    0.5,
    1.0000001,
    1e15,
    1e308,
    -1e308,
    float("inf"),
    float("nan"),
    "",
    "~",
    "~/x",
    "~nobody/x",
    "*",
    "data/{000..003}.tar",
    "a\0b",
    "é" * 300,
    "9" * 4301,
    "1" * 200,
    "http://[x",
    "-",
    "a\nb",
    None,
    True,
    [],
    {},
    [[]],
    [1] * 2000,
    {"epochs": 1e308},
    {"steps": 10**12},
    {"share": 1},
    {"examples": 0},
    {"examples": 10**12},
    {"epochs": 1e-9},
    {"minutes": 1e9},
    {"minutes": 1e-300},
    [{"epochs": 2}, {"epochs": 1}],
    [{"epochs": 1e9}],
    [{"examples": 1}] * 3,
    [{"epochs": 1}] * 1001,
]
RAW = [
    "[" * 3000,
    "{" * 3000,
    "- " * 3000,
    "9" * 4301,
    "1e999",
    "\0",
    '"\\0"',
    '"\\ud800"',
    '"\\UFFFFFFFF"',
    "&a [*a]",
    "*nowhere",
    "!!python/object:os.system {}",
    "{? [1]: 2}",
    "? ? ?",
    "'",
    "\t",
    "%",
    "@",
    "`",
    "[1, " * 2000,
    "\u2028",
    "\ufeff",
    "...",
    "---",
    "<<: {a: 1}",
    "{<<: *x}",
    "|",
    ">9",
    "!<tag:x> 1",
    "0x" + "f" * 5000,
    "1_000",
    "-" * 5000,
    "." * 5000,
    "#",
    "a: b: c",
    "[" + "1," * 30000 + "]",
    "{a: 1, a: 2}",
    ".inf",
    "-.inf",
    ".nan",
    "1e400",
]
LAUGHS = "\n".join(
    ["task: {use: 'a:B', with: {l0: &l0 [x]"]
    + [f", l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 20)]
    + ["}}"]
)


def mutations(number: int, seed: int):
    """Recipes with some of their values, keys or characters replaced, the same at every call."""
    draw = random.Random(seed)
    lines = WHOLE.splitlines()
    keys = sorted({key for model in SECTIONS.values() for key in model.model_fields})
    for _ in range(number):
        kind = draw.choice(["value", "value", "value", "raw", "characters", "override", "key"])
        overrides = draw.sample(VARIANTS, draw.choice([0, 0, 1]))
        text = WHOLE
        if kind == "value":
            values = yaml.safe_load(WHOLE)
            for _ in range(draw.choice([1, 1, 2, 3])):
                replaced(values, draw, keys)
            text = yaml.safe_dump(values, allow_unicode=True)
        elif kind == "raw":
            place = draw.randrange(len(lines))
            head = lines[place].partition(": ")[0]
            text = "\n".join([*lines[:place], f"{head}: {draw.choice(RAW)}", *lines[place + 1 :]])
        elif kind == "characters":
            place, odd = draw.randrange(len(WHOLE)), draw.choice(RAW)[:50]
            text = WHOLE[:place] + odd + WHOLE[place + draw.randrange(4) :]
        else:
            where = ".".join(draw.choice([loc for loc in SECTIONS if loc]))
            name = (
                draw.choice(keys) if kind == "override" else draw.choice(['"a.b"', "x" * 500, "", "1", "é"])
            )
            overrides = [*overrides, f"{where}.{name}={draw.choice([*map(str, ODD), *RAW])}"]
        yield text, overrides


def replaced(values: dict, draw: random.Random, keys: list[str]) -> None:
    """Replace one value somewhere, or add one under a known key."""
    section = values
    while True:
        name = draw.choice([*section, draw.choice(keys)])
        if not isinstance(section.get(name), dict) or not section[name] or draw.random() < 0.2:
            section[name] = draw.choice(ODD)
            return
        section = section[name]


class Bounded:
    """Counts lines of Python that run in our packages, and raises beyond a bound."""

    def __enter__(self):
        self.lines, self.before = 0, sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def trace(self, frame, event, argument):
        self.lines += event == "line"
        assert self.lines < MOST_OPERATIONS, "this recipe takes too long"
        return self.trace


def refusal(text: str, overrides: list[str]) -> str | None:
    """What is said of a recipe by its reading, its plan and what is shown of it; None where it may run."""
    try:
        recipe = recipes.parse(text, "r.yaml", overrides)
        made = planned(recipe, Points())
        report.lines(made)
        plot.lines(made)
        for number in (made.total_examples, made.served_examples, made.fresh_examples, made.warmup_examples):
            assert 0 <= number < 2**63
        assert all(np.isfinite(point.learning_rate) for point in plot.points(made, 7))
        assert recipes.parse(recipes.dump(recipe)) == recipe
    except UserError as error:
        return str(error)
    return None


def tried(number: int, seed: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for text, overrides in mutations(number, seed):
        with Bounded():
            said = refusal(text, overrides)
        refused += said is not None
        lost = [line for line in (said or "").splitlines() if not line.startswith(("r.yaml:", "--set: "))]
        assert not lost, (overrides, text[-300:])
        assert len(said or "") < 100_000
    assert number / 4 < refused < number, "the mutations tell nothing"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def test_hundreds_of_mutations_are_read_or_refused():
    assert refusal(WHOLE, []) is None
    tried(200, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_mutations_are_read_or_refused():
    for seed in range(2, 14):
        tried(500, seed)


@pytest.mark.parametrize("override", [
    "batch.size=1000000000039", "echo.factor=1e15", "train.epochs=1e308", "seed=18446744073709551616",
    "optimizer.lr=1e308", f"optimizer.momentum={'9' * 4301}", f"task.with.x={'[' * 3000}",
    "batch.growth={shape: ramp, start: 8, increment: 8, over: {epochs: 1}}", "run.pool.max=1000000000",
    "schedule.cooldown={epochs: 100}", "schedule={warmup: {epochs: 6}, cooldown: {epochs: 5}}",
    "schedule.decay.at=[{epochs: 4}, {epochs: 2}]", "schedule.decay.at=[{epochs: 10}]",
    "schedule.decay={shape: exponential, factor: 0.9, hold: {epochs: 11}}",
    "schedule.decay={shape: exponential, factor: 0.9, every: {epochs: 0.0001}}",
    "echo.capacity=10001", "eval.every={epochs: 100000}", "checkpoint.every={steps: 10000000}",
    "train.target={metric: loss, at_most: .nan}", "schedule.scale={rule: power, base_batch: 1, power: 300}",
    "train.epochs=0.0001", "train.steps=100000000000000", "train.average.start={epochs: 10}",
    "batch.growth={shape: multiply, at: [{epochs: 1}, {epochs: 2}, {epochs: 3}, {epochs: 4}], factor: 1001}",
    "optimizer.weight_decay=.nan", "optimizer.betas=[0.9, 1e308]", "name=" + "a" * 200, "echo.max_age=5",
    "checkpoint.dir=\"a\\0b\"", "batch.shuffle={block: 10, window: 1000000000000}",
])  # fmt: skip
def test_what_is_out_of_all_bounds_is_refused_with_its_key(override):
    key = override.partition("=")[0]
    text = WHOLE
    if key.startswith("batch.growth") and "ramp" in override:
        text = WHOLE.replace("size: 96", "size: 80000000000")
    with Bounded():
        said = refusal(text, [override])
    assert said is not None
    assert key.split(".")[0] in said
    assert said.startswith(("--set: ", "r.yaml:"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "leads to more than 5000 values"),
        ("task: &a [*a]\n", "leads to more than 24 levels"),
        ("task: " + "[" * 3000, "r.yaml:1: is not YAML: it is nested more than 24 levels deep"),
        ("- " * 3000, "nested more than 24 levels deep"),
        ("name: a\nx: \0\n", "r.yaml:2: is not YAML: unacceptable character"),
        ("x: " + "a" * 2**17, "has 131075 characters; write at most 131072"),
        ("x: [" + "1," * 20000 + "]", "r.yaml:1: is not YAML: it has more than 5000 values"),
        ("seed: " + "9" * 4301, "r.yaml:1: seed: has 4301 digits; give at most 300"),
        ("seed: 1e999", "r.yaml:1: seed: is 1e999, more than a number can hold"),
        ("\n".join(f"k{n}: 1" for n in range(2000)), "k42: is an unknown key"),
    ],
    ids=range(10),
)
def test_texts_without_bounds_are_refused_at_once(text, message):
    with Bounded(), pytest.raises(RecipeError) as error:
        recipes.parse(text, "r.yaml")
    assert message in str(error.value)
    assert len(error.value.problems) <= recipes.MOST_PROBLEMS


def test_files_that_do_not_end_are_refused(tmp_path: Path):
    long = tmp_path / "long.yaml"
    long.write_bytes(b"#" * (1 << 20))
    os.mkfifo(tmp_path / "pipe")
    for path, why in [
        (long, "more than 131072"),
        (tmp_path / "pipe", "no plain file"),
        ("/dev/zero", "no plain"),
    ]:
        with pytest.raises(UserError, match=why):
            recipes.read(path)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 10**4))
def test_divisors_are_those_that_divide(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_numbers_that_a_search_would_never_end_with_are_computed():
    with Bounded():
        assert divisors(999_999_999_989) == [1, 999_999_999_989]
        assert busiest_worker(10**12 + 1, 16384, 3) == pytest.approx(1 / 3, rel=1e-3)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("task.with.c=#fff", "#fff"),
        ("task.with.c=no #1", "no #1"),
        ("task.with.c=#", "#"),
        ('task.with.c="#fff" # grey', "#fff"),
        ("task.with.c=", None),
        ("task.with.c=3", 3),
    ],
)
def test_a_command_line_has_no_comments(override, value):
    assert recipes.parse(WHOLE, "r.yaml", [override]).task.with_["c"] == value


@pytest.mark.parametrize("key", ['"head.*"', "'head.*'"])
def test_a_key_with_dots_is_set_in_quotes(key):
    read = recipes.parse(WHOLE, "r.yaml", [f"optimizer.lr_multipliers.{key}=3"])
    assert read.optimizer.lr_multipliers == {"weight": 2.0, "head.*": 3.0}
    wrong = refusal(WHOLE, [f"optimizer.lr_multipliers.{key}=fast"])
    assert wrong is not None
    assert wrong.startswith("--set: optimizer.lr_multipliers")
    assert "a key with dots in quotes" in (refusal(WHOLE, ["optimizer.lr_multipliers.head.*=3"]) or "")


PATHS = {"init.from": "from_", "checkpoint.dir": "dir", "checkpoint.mirror": "mirror", "track.uri": "uri"}


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("odd", ["data/*.tar", "a?", "{000..003}.tar", "{a,b}", "~nobody-here/x"])
def test_keys_that_are_paths_stand_for_one_each(key, odd):
    said = refusal(WHOLE, [f"{key}='{odd}'"]) or ""
    assert said.startswith(f"--set: {key}: is {odd}, ")
    assert "path" in said


@pytest.mark.parametrize("key", PATHS)
def test_the_home_folder_is_meant_by_its_sign_in_every_key(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    section, _ = key.split(".")
    read = recipes.parse(WHOLE, "r.yaml", [f"{key}=~/x"])
    assert getattr(getattr(read, section), PATHS[key]) == "/home/ann/x"
    database = recipes.parse(WHOLE, "r.yaml", ["track.uri=sqlite:///~/m.db"]).track.uri
    assert database == "sqlite:////home/ann/m.db"


def test_weights_that_are_not_there_are_refused_at_the_line_that_names_them():
    said = refusal(WHOLE.replace("from: null", "from: nowhere"), [])
    assert said is not None
    assert said.startswith("r.yaml:4: init.from: is nowhere, and there are no weights there or in runs; ")

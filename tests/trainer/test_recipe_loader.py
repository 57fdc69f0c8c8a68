"""The loader of recipes: what it reads, and what it says about each mistake."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import RecipeError, UserError
from trainer.recipe import loader as recipes
from trainer.recipe.schema import SECTIONS, Recipe

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SMALL = """\
name: small
task: {use: "some.module:Task"}
batch: {size: 64, micro: 8, lanes: 8}
optimizer: {name: sgd, lr: 0.1}
train: {epochs: 1}
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        recipes.parse(text, "r.yaml", overrides)
    return str(error.value).splitlines()


def parse(*overrides: str) -> Recipe:
    return recipes.parse(SMALL, "r.yaml", overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_are_read_and_survive_a_dump(path):
    recipe = recipes.read(path)
    assert recipe.name == path.stem
    assert recipes.parse(recipes.dump(recipe)) == recipe


def test_the_resolved_recipe_writes_out_published_hyperparameters_and_derived_values():
    recipe = parse("optimizer={name: lamb}", "echo.factor=1.5")
    assert recipe.optimizer.hyper["betas"] == (0.9, 0.999)
    assert recipe.echo.capacity == 32  # 8 lanes of 8 examples, half of them wait for a second copy
    assert yaml.safe_load(recipes.dump(recipe))["optimizer"]["eps"] == 1e-6


@pytest.mark.parametrize(
    ("written", "value"),
    [("3e-4", 3e-4), ("1.0e5", 1e5), ("1e+5", 1e5), ("5", 5.0), (".5", 0.5), ("+1.5", 1.5), ("1.", 1.0)],
)
def test_numbers_are_numbers(written, value):
    assert parse(f"optimizer.lr={written}").optimizer.lr == value


@pytest.mark.parametrize(
    "text", ["on", "no", "Yes", "off", "1:30", "0o17", "2026-11-22", "1_000", "0x10", "<<", "="]
)
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text):
    assert parse(f"task.with.x={text}").task.with_ == {"x": text}
    assert (
        recipes.parse(
            SMALL.replace("name: small", f"name: small\ntrack: {{experiment: {text}}}")
        ).track.experiment
        == text
    )


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("null", None), ("~", None), ("", None), ('"3"', "3")]
)
def test_plain_values_of_yaml_1_2(text, value):
    assert parse(f"task.with.x={text}").task.with_ == {"x": value}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), json_values))
def test_any_arguments_of_a_task_survive_a_dump(arguments):
    recipe = parse()
    recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"with_": arguments})})
    assert recipes.parse(recipes.dump(recipe)).task.with_ == arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1: the recipe is empty; write sections"),
        ("- a\n- b\n", "r.yaml:1: the recipe is a list; write sections"),
        ("batch", "r.yaml:1: the recipe is a single value; write sections"),
        ("name: [a\n", "r.yaml:2: is not YAML: "),
        ("name: a\n---\nname: b\n", "r.yaml:2: is not YAML: "),
    ],
)
def test_files_that_are_no_recipe(text, message):
    assert problems(text)[0].startswith(message)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "binary"])
def test_files_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: cannot be read (")):
        recipes.read(path)
    with pytest.raises(UserError, match="Is a directory"):
        recipes.read(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.sise=3", "batch.sise: is an unknown key; did you mean size?"),
        ("lr=3", "lr: is an unknown key; did you mean optimizer.lr?"),
        (
            "schedule.decay={shape: cosine, powr: 2}",
            "schedule.decay.powr: is an unknown key; there are shape, end",
        ),
        ("optimizer.name=adamm", 'optimizer.name: is "adamm", an unknown optimizer; did you mean adam?'),
        ("optimizer.momentun=0.9", "optimizer.momentun: is unknown to sgd; did you mean momentum?"),
        (
            "optimizer.momentum=high",
            'optimizer.momentum: is "high"; give a value such as 0, the published one',
        ),
        ("optimizer.nesterov=1", "optimizer.nesterov: is 1; give a value such as false, the published one"),
        (
            "optimizer.momentum=-1",
            "optimizer.momentum: is -1 (Invalid momentum value: -1); the published value is 0",
        ),
        (
            "optimizer={name: adafactor}",
            "adafactor has no published rate that a schedule could follow; give one; or `lr: 1` with `rel",
        ),
        ("optimizer.lr=-0.1", "optimizer.lr: is -0.1; it should be greater than 0"),
        ("batch.size=0", "batch.size: is 0; it should be greater than 0"),
        ("batch.micro=-8", "batch.micro: is -8; it should be greater than 0"),
        ("batch.micro=8.0", "batch.micro: is 8.0; it should be a valid integer"),
        (
            "batch.size=100",
            "batch.size: is 100, and micro 8 does not divide it; the nearest sizes are 96 and 104",
        ),
        ("batch.size=100", "the nearest micro is 10"),
        ("batch.bn_group=3", "batch.bn_group: is 3 and does not divide micro 8; give one of 1, 2, 4, 8"),
        (
            "run.workers=9",
            "run.workers: is 9, and a step has 8 micro-batches from 8 lanes; the largest that works is 8",
        ),
        ("run.workers=two", 'run.workers: is "two"; it should be a valid integer'),
        ("run.workers={min: 3, max: 2}", "run.workers.max: is 2, less than min 3; give 3 or more"),
        ("run.workers={min: 0, max: 2}", "run.workers.min: is 0; it should be greater than 0"),
        ("run.workers={min: 1}", "run.workers.max: is missing; give the most workers at a time"),
        ("run.workers={most: 2, max: 2}", "run.workers.most: is an unknown key"),
        ("run.workers={max: 9}", "run.workers: is 9, and a step has 8 micro-batches from 8 lanes"),
        ("run.stack=0", "run.stack: is 0; it should be 'auto', or greater than 0"),
        ("run.pool={min: 3, max: 2}", "run.pool.max: is 2, less than min 3; give 3 or more"),
        (
            "run={compile: true, reduction: exact}",
            "run.compile: is true, and reduction is exact; leave it out",
        ),
        ("run.compile=yes", 'run.compile: is "yes"; it should be a valid boolean'),
        ("run.recompute=blocks.*", 'run.recompute: is "blocks.*"; it should be a valid boolean, or a list'),
        ("train.precision=fp8", "train.precision: is \"fp8\"; it should be 'fp32', 'bf16' or 'fp16'"),
        (
            "init={from: first, zero: [norm.*]}",
            "init.zero: is norm.*, and from is first; leave it out: all weights come from there",
        ),
        ("run.parallel=zero", "run.parallel: is \"zero\"; it should be 'ddp' or 'fsdp'"),
        ("run.parallel={fsdp: {unit: a}}", "run.parallel.fsdp.unit: is an unknown key"),
        ("run.parallel={}", "run.parallel: gives none of ddp and fsdp; give one of them"),
        ("run.parallel={ddp: {}, fsdp: {}}", "run.parallel: gives ddp and fsdp; give one of them"),
        ("run={parallel: fsdp, compile: true}", "run.compile: is true, and parallel is fsdp"),
        ("run={parallel: fsdp, channels_last: true}", "run.channels_last: is true, and parallel is fsdp"),
        ("train.average=ema", 'train.average: is "ema"; give a section, one of ema, swa'),
        ("train.average={kind: em}", "train.average.kind: is em; did you mean ema?"),
        (
            "echo={factor: 2, capacity: 10}",
            "echo.capacity: is 10, too small to shuffle the echoes of 8 lanes of 8",
        ),
        ("echo={factor: 2, capacity: 10}", "the smallest that works is 64"),
        ("echo.factor=.inf", "echo.factor: is Infinity; it should be a finite number"),
        ("echo.factor=0.5", "echo.factor: is 0.5; it should be greater than or equal to 1"),
        ("train={}", "train: gives no unit; give one of examples, epochs, steps"),
        ("train.epochs=0", "train.epochs: is 0; give more than 0"),
        ("eval.every={epochs: 1, steps: 3}", "eval.every: gives epochs and steps; give one of"),
        ("eval.every.minutes=1", "eval.every.minutes: is an unknown key"),
        ("schedule.decay={power: 2}", "schedule.decay.shape: is missing; there are constant, step, cosine"),
        ("schedule.decay={shape: cosin}", "schedule.decay.shape: is cosin; did you mean cosine?"),
        (
            "schedule.decay={shape: step, at: [{epoch: 1}]}",
            "schedule.decay.at.0.epoch: is an unknown key; did you mean",
        ),
        (
            "schedule.scale.rule=linear",
            "schedule.scale.base_batch: is missing for rule linear; give the batch",
        ),
        ("schedule.warmup={epochs: 1, shape: exponential}", "schedule.warmup: shape exponential starts at 0"),
        ("name=a b", 'name: is "a b"; give the name of the run'),
        ("task.use=digits", 'task.use: is "digits"; give the `package.module:Class` of the task'),
        ("batch=", "batch: is null; give keys: size, micro, lanes"),
        (
            "batch=!!python/object:os.system {}",
            "batch: has the tag tag:yaml.org,2002:python/object:os.system",
        ),
        ("schedule", "'schedule' is no override; write key.sub=value"),
    ],
)
def test_each_mistake_says_what_is_wrong_and_what_would_be_right(override, message):
    assert any(line.startswith("--set: ") and message in line for line in problems(SMALL, override))


places = st.sampled_from([".".join(loc) for loc in SECTIONS if loc])
keys = st.sampled_from(
    sorted({name for model in SECTIONS.values() for name in model.model_fields} | {"", "x"})
)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 8, 16, 64, 128, 0.5, 1.5])
anything = st.recursive(
    numbers | st.none() | st.booleans() | st.text(max_size=4) | keys,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(changes=st.lists(st.tuples(places, keys, anything), min_size=1, max_size=3))
def test_whatever_is_written_is_read_or_refused_with_places_and_cures(changes):
    values = yaml.safe_load(SMALL)
    for place, key, value in changes:
        section = values
        for name in place.split("."):
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[key] = value
    found = read_or_refusal(yaml.safe_dump(values))
    if isinstance(found, Recipe):
        assert recipes.parse(recipes.dump(found)) == found
    else:
        lines = str(found).splitlines()
        assert lines
        assert [line for line in lines if not re.fullmatch(r"r\.yaml:\d+: .+; .+", line)] == []


def read_or_refusal(text: str) -> Recipe | RecipeError:
    try:
        return recipes.parse(text, "r.yaml")
    except RecipeError as error:
        return error


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file():
    text = """\
name: small
nmae: twice
task: {use: "some.module:Task"}
batch:
  size: 100
  micro: 8
  lanes: 8
  lanes: 9
optimizer: {name: sgd, lr: fast,
  momentum: 0.9, epsilon: 1}
echo: {factor: 2, capacity: 10}
eval:
  every: {epochs: -1}
"""
    lines = problems(text)
    keys = [line.split(": ")[:2] for line in lines]
    assert keys == [
        ["r.yaml:1", "train"],
        ["r.yaml:2", "nmae"],
        ["r.yaml:5", "batch.size"],
        ["r.yaml:8", "batch.lanes"],
        ["r.yaml:9", "optimizer.lr"],
        ["r.yaml:10", "optimizer.epsilon"],
        ["r.yaml:13", "eval.every.epochs"],
    ]
    assert "is given twice, first in line 7; keep one" in lines[3]


def test_a_contradiction_between_valid_sections_is_reported_beside_other_mistakes():
    lines = problems(SMALL, "run.workers=20", "eval.every=often")
    assert [line.split(": ")[1] for line in lines] == ["eval.every", "run.workers"]


def test_overrides_are_checked_like_the_file_and_replace_a_length_s_unit():
    recipe = parse(
        "train.steps=3", "optimizer.lr=1e-2", "schedule.warmup.share=0.1", "run={workers: 2}", "seed=7"
    )
    assert (recipe.train.unit, recipe.train.steps, recipe.train.epochs) == ("steps", 3, None)
    assert recipe.optimizer.lr == 0.01
    assert recipe.schedule.warmup is not None
    assert recipe.schedule.warmup.share == 0.1
    assert (recipe.run.workers, recipe.seed) == (2, 7)


def test_a_task_s_arguments_are_no_lengths():
    recipe = parse("task.with.epochs=3", "task.with.steps=4")
    assert recipe.task.with_ == {"epochs": 3, "steps": 4}


@pytest.mark.parametrize(
    ("growth", "sizes"),
    [
        ("{shape: multiply, at: [{epochs: 1}, {epochs: 2}], factor: 2, max: 128}", [64, 128, 128]),
        ("{shape: ramp, start: 16, increment: 16, over: {share: 0.5}}", [16, 32, 48, 64]),
        ("{shape: ramp, start: 16, increment: 32, over: {share: 0.5}}", [16, 48, 64]),
        ("{shape: steps, at: [{epochs: 1}], sizes: [256]}", [64, 256]),
    ],
)
def test_sizes_of_a_growing_batch(growth, sizes):
    assert parse(f"batch.growth={growth}").batch.sizes == sizes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["batch.growth={shape: multiply, at: [{epochs: 1}], factor: 1.2}"],
            "gives stage 2 a batch of 77, and micro 8",
        ),
        (
            ["batch.growth={shape: ramp, start: 12, increment: 8, over: {epochs: 1}}"],
            "gives stage 1 a batch of 12",
        ),
        (
            ["batch.growth={shape: ramp, start: 80, increment: 8, over: {epochs: 1}}"],
            "start is 80, not below size 64",
        ),
        (
            ["batch.growth={shape: steps, at: [{epochs: 1}], sizes: [8, 16]}"],
            "sizes: has 2 batches for 1 places",
        ),
        (
            ["batch.growth={shape: ramp, start: 8, increment: 8, over: {epochs: 1}}", "run.workers=2"],
            "run.workers: is 2, and a step has 1 micro-batches",
        ),
    ],
)
def test_every_stage_of_a_growing_batch_is_checked(overrides, message):
    assert any(message in line for line in problems(SMALL, *overrides))


def test_a_problem_found_after_reading_stands_where_its_key_was_read():
    recipe = recipes.parse(SMALL, "r.yaml", ["batch.lanes=4"])
    assert str(recipe.problem("batch.size", "is large", "less")) == "r.yaml:3: batch.size: is large; less"
    assert str(recipe.problem("batch.lanes", "is odd", "less")) == "--set: batch.lanes: is odd; less"
    assert str(recipe.problem("echo.factor", "is odd", "less")) == "r.yaml:1: echo.factor: is odd; less"


def test_the_schema_names_every_section_and_describes_every_key():
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    for loc, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            assert field.description, (loc, name)

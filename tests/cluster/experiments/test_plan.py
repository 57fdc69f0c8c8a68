"""The door of sweeps: every mistake at once, and the recipe of each trial."""

import pytest

from cluster.experiments import plan as plans
from cluster.experiments.course import Order
from cluster.experiments.trials import Cell
from trainer.errors import RecipeError, UserError

RECIPE = """
name: base
task: {use: trainer.tasks.digits:Digits, with: {hidden: 16}}
batch: {size: 32, micro: 32, lanes: 4}
optimizer: {name: adamw, lr: 0.01, weight_decay: 0.1}
schedule: {scale: {rule: sqrt, base_batch: 8}}
train: {epochs: 4}
"""
SWEEP = """
name: tried
recipe: base.yaml
target: {metric: loss, at_most: 0.5}
batches: [8, 32]
"""


@pytest.fixture
def read(tmp_path):
    (tmp_path / "base.yaml").write_text(RECIPE)

    def read(text, *overrides):
        (tmp_path / "sweep.yaml").write_text(text)
        return plans.read(tmp_path / "sweep.yaml", overrides)

    return read


def problems(error):
    return [(problem.line, problem.key) for problem in error.value.problems]


def test_a_trial_has_the_cells_batch_its_rate_and_no_schedule_of_the_batch(read):
    arms = "arms: {a: {}, b: {optimizer: {name: sgd}}}"
    plan = read(f"{SWEEP}carry: {{beta2: tokens, weight_decay: linear}}\n{arms}")
    recipe = plan.recipe(Cell("a", 8), rate=0.3, seed=7)
    assert (recipe.batch.size, recipe.batch.micro, recipe.seed) == (8, 8, 7)
    assert recipe.optimizer.hyper["lr"] == 0.3
    assert recipe.schedule.scale.rule == "none"
    assert recipe.optimizer.hyper["betas"] == pytest.approx((0.9, 0.999**0.25))
    assert recipe.optimizer.hyper["weight_decay"] == pytest.approx(0.025)
    assert recipe.evaluation_micro == 32
    assert plan.recipe(Cell("b", 8), 0.3, 7).optimizer.name == "sgd"


def test_an_arms_optimizer_takes_nothing_from_the_recipes_own(read):
    plan = read(f"{SWEEP}arms: {{lion: {{optimizer: {{name: lion}}, train: {{clip_norm: 1}}}}}}")
    recipe = plan.arms["lion"]
    assert recipe.optimizer.hyper["weight_decay"] != 0.1
    assert (recipe.train.epochs, recipe.train.clip_norm) == (4, 1)


def test_further_axes_make_further_cells(read):
    plan = read(f"{SWEEP}also: {{echo.factor: [1, 2], train.clip_norm: [1.0]}}")
    assert len(plan.cells()) == 4
    cell = plan.cells()[-1]
    assert cell.axes == (("echo.factor", 2), ("train.clip_norm", 1.0))
    recipe = plan.recipe(cell, 0.1, 0)
    assert (recipe.echo.factor, recipe.train.clip_norm) == (2, 1)
    assert recipe.echo.capacity == 4 * 32


def test_an_axis_of_capacities_reaches_the_recipes(read):
    plan = read(f"{SWEEP}also: {{echo.factor: [2], echo.capacity: [128, 256]}}")
    assert {plan.recipe(cell, 0.1, 0).echo.capacity for cell in plan.cells()} == {128, 256}


def test_every_mistake_is_told_at_once_with_its_line(read):
    with pytest.raises(RecipeError) as error:
        read(
            """name: tried
recipe: base.yaml
target: {metric: loss, at_most: 0.5, at_least: 1}
batches: [32, 8]
rate: {search: grid}
carry: {beta3: tokens, weight_decay: cubic}
seeds: {search: [1, 2], report: 2}
rat: 3
"""
        )
    assert problems(error) == [
        (3, "target"),
        (4, "batches"),
        (5, "rate.values"),
        (6, "carry.beta3"),
        (6, "carry.weight_decay"),
        (7, "seeds.search"),
        (8, "rat"),
    ]


def test_the_arms_mistakes_have_their_place_in_the_sweep_and_the_recipes_in_its_file(read, tmp_path):
    with pytest.raises(RecipeError) as error:
        read(f"{SWEEP}arms:\n  a: {{optimizer: {{name: lam}}}}\n  b: {{batch: {{micro: -1}}}}")
    assert problems(error) == [(7, "optimizer.name"), (8, "batch.micro")]
    (tmp_path / "base.yaml").write_text(RECIPE.replace("lr: 0.01", "lr: big"))
    with pytest.raises(RecipeError) as error:
        read(SWEEP)
    assert error.value.problems[0].file.endswith("base.yaml")
    assert problems(error) == [(5, "optimizer.lr")]


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("also: {echo.factr: [2]}", "also"),
        ("also: {echo.at: [nowhere]}", "also"),
        ("carry: {momentum: tokens}", "carry.momentum"),
        ("arms: {a: {batch: {growth: {shape: multiply, at: [{epochs: 1}], factor: 2}}}}", "batch.growth"),
    ],
)
def test_cells_that_contradict_themselves_are_refused_before_the_first_trial(read, more, key):
    with pytest.raises(RecipeError) as error:
        read(f"{SWEEP}{more}")
    assert [problem.key for problem in error.value.problems] == [key]


def test_a_sweep_that_nobody_could_wait_for_is_refused(read):
    axes = ", ".join(f"task.with.k{i}: [1, 2, 3, 4, 5, 6, 7, 8]" for i in range(6))
    with pytest.raises(RecipeError, match="let them be 10000 at most"):
        read(f"{SWEEP}also: {{{axes}}}")


def test_a_missing_recipe_is_named(read):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        read(SWEEP.replace("base.yaml", "none.yaml"))


def test_overrides_reach_every_part(read):
    plan = read(SWEEP, "target.at_most=0.3", "seeds.report=2", "batches=[16]", "recipe.track.uri=none")
    assert plan.arms["base"].track.uri == "none"
    assert (plan.sweep.target.at_most, plan.sweep.seeds.report, plan.sweep.batches) == (0.3, 2, (16,))


def test_axes_have_plain_values(read):
    with pytest.raises(RecipeError, match=r"sweep\.yaml:\d+: also\.schedule\.decay: holds lists or sections"):
        read(f"{SWEEP}also: {{schedule.decay: [{{shape: cosine}}, {{shape: constant}}]}}")


def test_what_is_kept_in_the_folder_is_the_same_sweep(read, tmp_path):
    from trainer.recipe import loader

    plan = read(f"{SWEEP}arms: {{a: {{}}, b: {{optimizer: {{name: lars}}}}}}")
    (tmp_path / "base.yaml").unlink()  # the folder's sweep holds its recipe
    again = read(loader.dump(plan.sweep))
    assert again == plan


def test_a_trials_key_is_its_recipe(read):
    plan = read(SWEEP)

    def key(batch=8, rate=0.1, seed=0, **more):
        recipe = plan.recipe(Cell("base", batch), rate, seed)
        return Order(Cell("base", batch), rate, seed, "search", more.get("limit", 9), recipe).key

    assert key() == key(limit=99)
    assert len({key(), key(batch=32), key(rate=0.2), key(seed=1)}) == 4
    other = read(SWEEP.replace("0.5", "0.4"))
    recipe = other.recipe(Cell("base", 8), 0.1, 0)
    assert Order(Cell("base", 8), 0.1, 0, "search", 9, recipe).key != key()

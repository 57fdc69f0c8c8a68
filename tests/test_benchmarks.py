"""Every benchmark of recipes, in its smallest form, and the header that `benchmarks/recipes.py` rewrites."""

import importlib
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = {
    "rescue": ["--splits", "1", "--rates", "2", "--epochs", "2"],
    "growth": ["--seeds", "1", "--rates", "1", "--epochs", "1"],
    "text": ["--seeds", "1", "--rates", "1", "--steps", "2"],
}
RECIPE = """# Digits: lockstep train tiny.yaml
# Another line of the header.
name: tiny
task: {use: trainer.tasks.digits:Digits, with: {hidden: 8}}  # a comment
batch: {size: 64, micro: 64, lanes: 1}
optimizer: {name: sgd, lr: 0.1}
train: {epochs: 1}
"""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working folder of a benchmark, whose modules can be imported as its own script would."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_comparison_prints_its_table_draws_it_and_goes_on_from_what_it_kept(
    name, benchmarks, capsys, request
):
    arguments = [*SMALLEST[name], "--keep", "kept", "--plot", "picture.png"]
    if name == "text":
        text = request.getfixturevalue("shared_data") / "tinyshakespeare" / "input.txt"
        arguments += ["--data", str(text)]
    module(name).main(arguments)
    first = capsys.readouterr()
    assert re.search(r"^\| --- \|", first.out, re.MULTILINE)
    assert re.search(r", to be [<>]= .*: (met|MISSED)$", first.out, re.MULTILINE)
    assert (benchmarks / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert first.err  # a line for every trial
    module(name).main(arguments)
    second = capsys.readouterr()
    assert second.out == first.out
    assert not second.err  # and none was run again


def test_tuning_takes_the_rate_that_is_best_on_validation_and_never_looks_at_the_test(benchmarks):
    trials = module("trials")
    arm = trials.Arm("made up", {}, (0.1, 0.2, 0.3, 0.4))
    validation = {0.1: (0.8, 0.5), 0.2: (0.9, 0.6), 0.3: (0.9, 0.4), 0.4: (0.0, math.inf)}

    class MadeUp(trials.Trials):
        def run(self, arm, rate, seed):
            if rate == 0.4:
                return trials.Result(1, {}, [], "diverged")
            accuracy, loss = validation[rate]
            curve = [trials.Point(1, 1, {"accuracy": accuracy, "loss": loss})]
            return trials.Result(1, {"accuracy": 1 - accuracy + seed / 100, "loss": 1.0}, curve)

    tuned = MadeUp().tuned(arm, seeds=(1, 3))
    assert tuned.rate == 0.3
    assert not tuned.edge
    assert tuned.mean("accuracy") == pytest.approx(0.12)
    assert math.isinf(tuned.tried[0.4]["loss"])


def test_the_checkpoint_benchmark_tells_what_each_checkpoint_cost(benchmarks, capsys):
    smallest = ["--pairs", "1", "--steps", "30", "--every", "10", "--width", "16", "--layers", "1"]
    module("checkpoint").main(smallest)
    (costs,) = re.findall(r"\| ([-\d ]*\d) \|$", capsys.readouterr().out, re.MULTILINE)
    assert len(costs.split()) == 2  # after steps 10 and 20; the one after the last step delays nothing
    assert not list(benchmarks.iterdir())


def test_the_tracking_benchmark_compares_with_the_fewest_calls(benchmarks, capsys):
    module("tracking").main(["--trials", "2", "--rounds", "1"])
    assert re.search(r"^ratio \d+\.\d\d$", capsys.readouterr().out, re.MULTILINE)
    assert not list(benchmarks.iterdir())


def test_a_recipes_header_is_rewritten_and_nothing_else(benchmarks):
    recipe = benchmarks / "tiny.yaml"
    recipe.write_text(RECIPE)
    recipes = module("recipes")
    recipes.main([str(recipe), "--seeds", "1"])
    once = recipe.read_text()
    header, measured, *rest = once.partition("# Measured: ")
    line, _, body = rest[0].partition("\n")
    assert header + body == RECIPE
    assert measured
    number = r"\d+\.\d{3}"
    expected = (
        rf"test accuracy {number}, test loss {number} \(seed 0\); \d+ s from the command to the end \(.*\)"
    )
    assert re.fullmatch(expected, line), line
    recipes.write(recipe, "something else")
    assert recipe.read_text() == once.replace(line, "something else")


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipes_header_has_its_command_seconds_and_result_with_seeds(recipe: Path):
    header = re.match(r"(?:#.*\n)*", recipe.read_text()).group()  # type: ignore[union-attr]
    assert f"lockstep train configs/{recipe.name}" in header
    assert re.search(
        r"^# Measured: test .* \(seeds? .*\); \d+ s from the command to the end", header, re.MULTILINE
    )


def test_the_forecast_benchmark_meets_its_bars_on_the_stored_study(benchmarks, capsys):
    module("forecast").main([str(ROOT / "tests/data/digits_sweep.jsonl.gz"), "--check"])
    printed = capsys.readouterr().out
    assert "MISSED" not in printed
    assert re.search(r"^\| seeds resampled \| \d+% ", printed, re.MULTILINE)


def test_the_laws_benchmark_meets_its_bars_on_the_stored_study(benchmarks, capsys):
    module("scaling").main([str(ROOT / "tests/data/digits_sweep.jsonl.gz"), "--check"])
    printed = capsys.readouterr().out
    assert "MISSED" not in printed
    assert printed.count(": met") == 22


def test_a_step_over_parts_of_layers_sends_few_messages(benchmarks, capfd):
    module("sharded").main(["--steps", "1"])
    told = capfd.readouterr().out
    assert "| lockstep LAMB | 1 |" in told
    assert re.search(r"to be >= 5: met$", told, re.MULTILINE)
    assert "| lamb | 526,336 of 1,052,672 |" in told

"""The command line: what it lists, what it says, how it ends."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cluster.cli import lockstep
from tests.cluster.commands import environment, user_folder
from trainer.errors import RunFailed


def invoke(*arguments: str):
    return CliRunner().invoke(lockstep, list(arguments))


def test_help_needs_nothing_but_click():
    code = """
import sys
from cluster.cli import lockstep
lockstep(["--help"], standalone_mode=False)
heavy = {"torch", "numpy", "ray", "mlflow", "pydantic", "yaml", "rich", "optim", "data_echo"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_every_command_that_is_listed_explains_itself():
    for name in lockstep.commands:
        shown = invoke(name, "--help")
        assert shown.exit_code == 0
        assert "Usage: lockstep" in shown.output or f"Usage: {name}" in shown.output


def test_check_shows_the_resolved_recipe_and_the_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(user_folder(tmp_path))
    shown = invoke("check", "tiny.yaml", "--set", "batch.micro=16")
    assert shown.exit_code == 0, shown.output
    assert "micro: 16" in shown.output
    assert "32 = 2 micro-batches of 16" in shown.output


def test_schema_is_json():
    assert json.loads(invoke("schema").output)["properties"]["batch"]


def test_optimizers_are_listed_described_and_compared():
    assert "| `lamb` |" in invoke("optimizers").output
    assert "arXiv:1904.00962" in invoke("optimizers", "lamb").output
    shown = invoke("optimizers", "--compare", "torch.optim:Adafactor")
    assert shown.exit_code == 0
    assert "adafactor, not the paper's" in shown.output
    for wrong in ("torch.optim:AdamW", "nowhere:Class", "torch.optim"):
        refused = invoke("optimizers", "--compare", wrong)
        assert refused.exit_code == 2
        assert "passport: " in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["tiny.yaml", "--set", "batch.size=31"], "batch"),
        (["tiny.yaml", "--set", "task.use=my_task:Lime"], "did you mean my_task:Line?"),
        (["tiny.yaml", "--set", "track.uri=postgresql://me:secret@host/db"], "track.uri: holds a password"),
    ],
)
@pytest.mark.parametrize("command", [["train"], ["train", "--local"], ["check"]])
def test_the_users_own_mistakes_are_refused_before_anything_starts(
    tmp_path, monkeypatch, command, arguments, message
):
    monkeypatch.chdir(user_folder(tmp_path))
    shown = invoke(*command, *arguments)
    assert shown.exit_code == 2, shown.output
    assert message in shown.output
    assert "Traceback" not in shown.output
    assert "secret" not in shown.output
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_the_recipe_can_feed_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(user_folder(tmp_path))
    shown = invoke("train", "tiny.yaml", "--set", "run.workers=5")
    assert shown.exit_code == 2
    assert "the largest that works is 4" in shown.output


def test_more_workers_than_the_machine_carries_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(user_folder(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    shown = invoke("train", "tiny.yaml", "--set", "run.workers=4")
    assert shown.exit_code == 2
    assert "run.workers: is 4, and this machine has 1 cores" in shown.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunFailed("the loss is nan"), 1, "failed: the loss is nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("a bug"), 1, "failed: ValueError: a bug\n--debug shows where"),
    ],
)
def test_how_a_command_ends_is_a_message_and_an_exit_code(monkeypatch, error, code, message):
    def fails(*_):
        raise error

    monkeypatch.setattr("trainer.recipe.loader.read", fails)
    shown = invoke("check", "tiny.yaml")
    assert (shown.exit_code, "Traceback" in shown.output) == (code, False)
    assert message in shown.output
    with_debug = invoke("check", "tiny.yaml", "--debug")
    assert (with_debug.exit_code, "Traceback" in with_debug.output) == (code, True)


def test_a_shadow_of_our_packages_is_refused_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.chdir(user_folder(tmp_path))
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    shown = invoke("check", "tiny.yaml")
    assert shown.exit_code == 2
    assert f"{tmp_path / 'trainer'}: has the name of Lockstep's own package trainer" in shown.output

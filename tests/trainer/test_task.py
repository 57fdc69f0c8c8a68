"""Finding the user's task, and refusing what cannot be one."""

import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import task
from trainer.errors import RecipeError, UserError
from trainer.recipe.schema import TaskSection

WHOLE = """
class Mine:
    def __init__(self, size, colour="red"):
        if size < 0:
            raise ValueError(f"size is {size}; give 0 or more")
        self.size, self.colour = size, colour
    def model(self): ...
    def source(self, split): ...
    def prepare(self, example, draw): ...
    def augment(self, batch, draw): ...
    def loss(self, model, batch): ...
    def metrics(self, model, batch): ...

class Partly:
    def model(self): ...

thing = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's, as the working folder; modules imported from it are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(WHOLE)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(use: str, **with_: object):
    return task.load(TaskSection.model_validate({"use": use, "with": with_}))


def test_a_task_is_found_in_the_working_folder(folder):
    found = load("mine:Mine", size=3)
    assert (found.size, found.colour) == (3, "red")


def test_what_makes_a_task_travels_to_another_process(folder):
    make = pickle.dumps(functools.partial(task.make, "mine:Mine", {"size": 3, "colour": "blue"}))
    code = f"import pickle, sys; print(pickle.loads({make!r})().colour)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True
    )
    assert done.stdout.strip() == "blue"


def test_a_package_in_the_working_folder(folder):
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").touch()
    (folder / "pack" / "inner.py").write_text(WHOLE)
    assert load("pack.inner:Mine", size=1).size == 1


@pytest.mark.parametrize(
    ("use", "with_", "message"),
    [
        ("nowhere:Mine", {}, "task.use: is nowhere:Mine, and there is no module nowhere in "),
        ("mine.deeper:Mine", {}, "task.use: is mine.deeper:Mine, and there is no module mine.deeper in "),
        ("mine:Mein", {}, "has no Mein; did you mean mine:Mine?"),
        (
            "mine:thing",
            {},
            "task.use: mine:thing is no class; name a class with the methods of trainer.task.Task",
        ),
        (
            "mine:Partly",
            {},
            "mine:Partly has no source, prepare, augment, loss, metrics; a task has all methods of",
        ),
        (
            "mine:Mine",
            {"size": 1, "color": "b"},
            "task.with.color: is unknown to mine:Mine; did you mean colour?",
        ),
        ("mine:Mine", {"color": "b"}, "task.with.size: is missing; mine:Mine needs it"),
        (
            "mine:Mine",
            {"size": -1},
            "task.with: mine:Mine raised ValueError: size is -1; give 0 or more (mine.py:5); fix its",
        ),
        (
            "breaks:Mine",
            {},
            "task.use: importing breaks raised ZeroDivisionError: division by zero; fix the module",
        ),
        ("garbled:Mine", {}, "task.use: importing garbled raised SyntaxError: "),
        ("needs:Mine", {}, "task.use: needs needs not_installed_anywhere; install not_installed_anywhere"),
        ("leaves:Mine", {}, "task.use: importing leaves raised SystemExit: 3; fix the module"),
    ],
)
def test_what_is_no_task_is_refused_in_one_line_each(folder, use, with_, message):
    (folder / "breaks.py").write_text("1 / 0\n")
    (folder / "garbled.py").write_text("def (\n")
    (folder / "needs.py").write_text("import not_installed_anywhere\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(RecipeError) as error:
        load(use, **with_)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == len(error.value.problems)


@pytest.mark.parametrize("name", ["trainer.py", "optim/__init__.py", "cluster.py", "data_echo/__init__.py"])
def test_a_module_that_would_shadow_ours_is_refused_with_the_cure(folder, name):
    shadow = folder / name
    shadow.parent.mkdir(exist_ok=True)
    shadow.touch()
    with pytest.raises(
        UserError, match=r"has the name of Lockstep's own package \w+ .*; rename it, or run from"
    ):
        task.refuse_shadows(folder)
    with pytest.raises(UserError):
        load("mine:Mine", size=1)


def test_another_checkout_is_refused_with_its_own_cure(folder):
    for name in task.PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    with pytest.raises(UserError, match=r"install this checkout with `pip install -e \.`"):
        task.refuse_shadows(folder)


def test_folders_that_shadow_nothing_pass(folder):
    (folder / "cluster").mkdir()  # data, not a package
    task.refuse_shadows(folder)
    task.refuse_shadows(Path(task.__file__).resolve().parents[1])  # our own checkout

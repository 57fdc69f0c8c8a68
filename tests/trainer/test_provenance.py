"""Where numbers come from: the code and the data, and how they differ."""

import sys
from pathlib import Path

import numpy as np
import pytest

from data_echo import ArraySource
from tests.trainer.reproducibility import NoisyTask, recipe
from trainer.plan import provenance
from trainer.plan.inputs import Inputs


def origin(task: NoisyTask) -> provenance.Provenance:
    return provenance.of(recipe(), Inputs.of(recipe(), task))


TASK = "from tests.trainer.reproducibility import NoisyTask\n\n\nclass Mine(NoisyTask):\n    pass\n"


@pytest.fixture
def user_package(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "my_models"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "net.py").write_text(TASK)
    (folder / "layers.py").write_text("WIDTH = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("my_models")]:
        del sys.modules[name]


def test_every_file_of_the_tasks_package_counts(user_package: Path):
    chosen = recipe(task={"use": "my_models.net:Mine"})
    inputs = Inputs.of(chosen)
    before = provenance.of(chosen, inputs)
    assert provenance.differences(before, provenance.of(chosen, inputs), "code") == []
    (user_package / "layers.py").write_text("WIDTH = 4\n")
    (user_package / "more.py").write_text("")
    changed, more = provenance.differences(before, provenance.of(chosen, inputs), "code")
    assert changed.startswith("code: my_models/layers.py: is ")
    assert more.startswith("code: my_models/more.py: is ")
    assert more.endswith("was made with none")


def test_one_number_of_the_data_is_noticed():
    class Altered(NoisyTask):
        def source(self, split: str) -> ArraySource:
            x = np.array(self.arrays["x"])
            x[0, 0] += split == "train"
            return ArraySource({**self.arrays, "x": x})

    before, now = (origin(task) for task in (NoisyTask(), Altered()))
    (line,) = provenance.differences(before, now, "data")
    assert line.startswith("data: train.hash: is ")
    assert provenance.differences(before, now, "code") == []


def test_nothing_is_said_of_a_checkpoint_that_does_not_know():
    now = origin(NoisyTask())
    assert provenance.differences({}, now, "code") == []


def test_nested_descriptions_are_compared_where_they_differ():
    class Files(list):
        def fingerprint(self):
            return {"files": [{"name": "a", "rows": 3}, {"name": "b", "rows": self[0]}]}

    class Listed(NoisyTask):
        def __init__(self, rows: int):
            super().__init__()
            self.rows = rows

        def source(self, split):
            return Files([self.rows] * 203)

    before, now = (origin(Listed(rows)) for rows in (4, 5))
    lines = provenance.differences(before, now, "data")
    assert lines[0] == "data: test.files.1.rows: is 5, and the checkpoint was made with 4"
    assert len(lines) == 3

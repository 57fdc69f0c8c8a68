"""Every example runs as it stands, needs no more than it says, and is what the pages show."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.commands import environment, run

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
ALONE = {"optim_alone": "optim", "data_echo_alone": "data_echo"}  # example -> its only package of ours
GIVEN = {"line_task.py": "python", "line.yaml": "yaml"}  # what docs/tasks.md shows whole
LIST_IMPORTS = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"


@pytest.mark.parametrize("name", ALONE)
def test_a_package_used_alone_learns_and_imports_nothing_else_of_ours(name: str, tmp_path: Path):
    told = subprocess.run(
        [sys.executable, "-c", LIST_IMPORTS, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True,
    )
    *output, modules = told.stdout.splitlines()
    assert float(re.search(r"(?:->|last loss) (\d+\.\d+)", "\n".join(output)).group(1)) < 0.1  # type: ignore[union-attr]
    imported = {module.partition(".")[0] for module in modules.split()}
    assert imported & {"optim", "data_echo", "trainer", "cluster"} == {ALONE[name]}
    assert not imported & {"ray", "mlflow", "yaml", "pydantic"}


def test_the_example_of_a_task_trains(tmp_path: Path):
    for name in GIVEN:
        shutil.copy(EXAMPLES / name, tmp_path)
    check = run("check", "line.yaml", "--set", "track.uri=none", cwd=tmp_path)
    assert check.process.returncode == 0, check.output
    command = run("train", "line.yaml", "--set", "track.uri=none", "--local", cwd=tmp_path)
    assert command.process.returncode == 0, command.output
    assert re.search(r"test at step 80: loss 0\.0", command.output), command.output


def test_every_example_is_tested():
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert files == {f"{name}.py" for name in ALONE} | GIVEN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_the_guide_shows_the_example(name: str):
    page = (ROOT / "docs" / "tasks.md").read_text()
    (shown,) = re.findall(rf"^```{GIVEN[name]}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert shown == (EXAMPLES / name).read_text(), f"docs/tasks.md shows another examples/{name}"

"""A wheel in a foreign folder: what is installed is enough, for training there and for jobs from there."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.commands import environment, journal, run, user_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Where a wheel of this checkout is unpacked to, alone."""
    pytest.importorskip("setuptools", "77", reason="builds a wheel without the network")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        if (PROJECT / name).is_file() and name.partition("/")[0] not in ("tests", "benchmarks", "docs"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((PROJECT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_the_wheel_holds_our_packages_and_nothing_else(installed):
    packages = {path.name for path in installed.iterdir() if path.is_dir() and "-" not in path.name}
    assert packages - {"bin"} == {"cluster", "data_echo", "optim", "trainer"}
    assert (installed / "trainer/tasks/digits.py").is_file()


def test_training_in_a_foreign_folder_uses_the_wheel_in_every_process(installed, tmp_path):
    folder = user_folder(tmp_path)
    task = (folder / "my_task.py").read_text()
    witness = 'import optim, trainer\nfor each in (optim, trainer): print("ours:", each.__file__)\n'
    (folder / "my_task.py").write_text(witness + task)
    command = run("train", "tiny.yaml", cwd=folder, PYTHONPATH=str(installed))
    assert command.process.returncode == 0, command.output
    assert journal(folder / "runs/tiny-001", "end")[-1]["status"] == "FINISHED"
    written = command.output + (folder / "runs/tiny-001/lockstep.log").read_text()
    seen = [Path(line.partition("ours: ")[2]) for line in written.splitlines() if "ours: " in line]
    assert len(seen) >= 2 * 4  # of the driver, both workers and the pool
    assert [path for path in seen if not path.is_relative_to(installed)] == []


def test_a_job_takes_the_wheels_packages_along(installed, tmp_path):
    folder = user_folder(tmp_path)
    code = "from cluster.ray_cluster import code_for_workers as code; print(*code('a.zip')['py_modules'])"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert {str(Path(path).parent) for path in told.stdout.split()} == {str(installed)}

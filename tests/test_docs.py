"""What the pages show is what works."""

import re
import shlex
from pathlib import Path

from tests.cluster.commands import run

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of one language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_guides_task_trains(tmp_path: Path):
    (task,), (recipe,) = blocks("docs/tasks.md", "python"), blocks("docs/tasks.md", "yaml")
    (tmp_path / "line_task.py").write_text(task)
    (tmp_path / "line.yaml").write_text(recipe + "track: {uri: none}\n")
    check = run("check", "line.yaml", cwd=tmp_path)
    assert check.process.returncode == 0, check.output
    command = run("train", "line.yaml", "--local", cwd=tmp_path)
    assert command.process.returncode == 0, command.output
    assert re.search(r"test at step 80: loss 0\.0", command.output), command.output


def test_every_page_that_is_linked_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_in_the_readme_is_one(tmp_path: Path):
    help_text = run("--help", cwd=tmp_path).output
    for command in re.findall(r"`lockstep ([a-z]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^  {command} ", help_text, re.MULTILINE), command


def test_the_readmes_two_commands_are_complete():
    install_and_train, install_and_test = blocks("README.md", "sh")
    assert shlex.split(install_and_train)[:2] == ["pip", "install"]
    assert "lockstep train configs/quickstart.yaml" in install_and_train
    assert install_and_test.strip().endswith("&& pytest")
    constraints = (ROOT / "constraints.txt").read_text()
    assert "torch==" in constraints
    assert "://" not in constraints

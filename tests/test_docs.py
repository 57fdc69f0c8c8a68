"""What the pages show is what works."""

import re
import shlex
from pathlib import Path

import pytest

from tests.cluster.commands import run

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "cluster", "configs", "data_echo", "docs", "examples", "optim", "tests", "trainer")
PAGES = [*ROOT.glob("*.md"), *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.md")))]
NAMES_OF_FILES = (
    "docs/architecture.md",
    "tests/README.md",
    "CONTRIBUTING.md",
)  # pages that point into the code


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of one language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", NAMES_OF_FILES)
def test_every_file_that_a_page_names_exists(page: str):
    """So that moving a file and leaving the page behind is noticed."""
    named = set(re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", (ROOT / page).read_text()))
    assert named
    assert not {path for path in named if not (ROOT / path).exists()}


def test_every_document_is_in_the_index_and_in_the_site():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\]\(([a-z_]+\.md)\)", (ROOT / "docs/index.md").read_text()))
    site = (ROOT / "mkdocs.yml").read_text()
    assert {path for path in pages if f": {path}\n" not in site} == set()


def test_every_module_of_the_api_pages_exists():
    for page in (ROOT / "docs/api").glob("*.md"):
        for module in re.findall(r"^::: ([\w.]+)", page.read_text(), re.MULTILINE):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module


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

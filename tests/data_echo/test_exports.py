"""What `data_echo` exports, under its present and its former names."""

import ast
from pathlib import Path

import pytest

import data_echo

ROOT = Path(data_echo.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
# What the files of each folder may import of the package, apart from their own folder.
BELOW = {
    "order": {"errors"},
    "sources": {"errors"},
    "prepare": {"draws", "errors", "order.hashing", "sources.source"},
}


def test_exported_names_resolve() -> None:
    for name in data_echo.__all__:
        assert getattr(data_echo, name).__name__ == name


@pytest.mark.parametrize(
    ("former", "name"), [("Deal", "ShuffledOrder"), ("Feed", "EchoLoader"), ("Order", "PrepareRequest")]
)
def test_former_names_resolve(former: str, name: str) -> None:
    assert getattr(data_echo, former) is getattr(data_echo, name)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        data_echo.Unknown  # noqa: B018


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, those for type checking included."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.removeprefix("data_echo.") for name in modules if name.startswith("data_echo.")}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_folders_import_downward(path: Path) -> None:
    folder = path.parts[0]
    if folder in BELOW:
        others = {name for name in imported(path) if not name.startswith(f"{folder}.")}
        assert others <= BELOW[folder]


def test_modules_import_without_circles() -> None:
    below = {".".join(path.with_suffix("").parts): imported(path) for path in FILES}
    while leaves := {name for name, names in below.items() if not names & below.keys()}:
        below = {name: names for name, names in below.items() if name not in leaves}
    assert not below, f"circles among {sorted(below)}"

"""The house keeps its shape: who imports whom, how long files and functions are, what nobody may write."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {  # what each package may import of the others
    "optim": set(),
    "data_echo": set(),
    "trainer": {"optim", "data_echo"},
    "cluster": {"optim", "data_echo", "trainer"},
}
DOORS = {  # where each foreign library may be imported
    "ray": {"cluster/*.py", "data_echo/prepare/ray_pool.py"},
    "mlflow": {"trainer/tracking/writer.py"},
    "deepspeed": set(),
    "yaml": {"trainer/recipe/loader.py"},
}
FILES = sorted(path.relative_to(ROOT) for package in BELOW for path in (ROOT / package).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imports(path: Path) -> Iterator[str]:
    """The top-level names of all that a file imports, wherever in the file it does."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downward(path: Path):
    package = path.parts[0]
    others = set(imports(path)) & BELOW.keys() - {package}
    assert others <= BELOW[package], f"{path} imports {others - BELOW[package]}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_foreign_libraries_come_in_by_their_doors(path: Path):
    for library, doors in DOORS.items():
        if library in imports(path):
            assert any(path.match(door) for door in doors), f"{path} imports {library}; only {doors} may"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_stay_short(path: Path):
    lines = (ROOT / path).read_text().count("\n")
    assert lines < 400, f"{path} has {lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            docstring = ast.get_docstring(node, clean=False) or ""
            assert length - docstring.count("\n") - 1 < 50, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_everything_public_says_what_it_is(path: Path):
    module = tree(path)
    kinds: tuple[type[ast.stmt], ...] = (ast.ClassDef, ast.FunctionDef)
    if path.is_relative_to("optim/rules"):
        kinds = (ast.ClassDef,)  # a rule's functions are the lines of its class's docstring
    public = [node for node in module.body if isinstance(node, kinds) and not node.name.startswith("_")]
    for node in public:
        assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
    # A file that holds one class is what the class is.
    assert ast.get_docstring(module) or len(public) == 1, f"{path} has no docstring"


def test_packages_have_no_junk_drawers():
    names = {part for path in FILES for part in (*path.parts[:-1], path.stem)}
    assert not names & {"utils", "util", "core", "common", "helpers", "manager", "misc"}


def test_every_package_and_subpackage_is_in_the_wheel():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {".".join(path.parent.parts) for path in FILES}

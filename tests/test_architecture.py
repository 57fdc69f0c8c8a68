"""The architecture holds: who imports whom, how long files and functions are, which names stand where."""

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
HOMES = {  # where each foreign library may be imported
    "ray": {"cluster/*.py", "data_echo/prepare/ray_pool.py"},
    "mlflow": {"trainer/tracking/*.py"},
    "deepspeed": set(),
    "optuna": {"cluster/experiments/tpe.py"},
    "yaml": {"trainer/recipe/loader.py"},
    "pydantic": {"trainer/recipe/*.py"},
    "pyarrow": {"data_echo/sources/parquet.py"},
    "PIL": {"data_echo/images.py"},
    "simplejpeg": {"data_echo/images.py"},
    "fsspec": {"data_echo/sources/files.py", "cluster/mirror.py"},
    "safetensors": {"trainer/*.py", "trainer/compute/*.py", "trainer/tracking/*.py"},
    "click": {"cluster/cli.py"},
    "rich": {"cluster/console.py"},
}
TOP_OF_TRAINER = 18  # entries that a reader of `ls trainer` can take in
FILES = sorted(path.relative_to(ROOT) for package in BELOW for path in (ROOT / package).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def docstrings(module: ast.Module) -> set[str | None]:
    """Those of a module, its classes and its functions, as they are written."""
    nodes = [
        each for each in ast.walk(module) if isinstance(each, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    return {ast.get_docstring(node, clean=False) for node in nodes}


def imports(path: Path) -> Iterator[str]:
    """The top-level names of all that a file imports, wherever in the file it does."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in the file, for type checking too."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in MODULES else node.module for part in parts}
    return (found & MODULES.keys()) - {module_name(path)}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some nodes that import each other in turn; none where there is no circle."""
    done: set[str] = set()

    def visit(node: str, above: list[str]) -> list[str]:
        if node in above:
            return above[above.index(node) :]
        if node in done:
            return []
        found = next(filter(None, (visit(other, [*above, node]) for other in sorted(graph[node]))), [])
        done.add(node)
        return found

    return next(filter(None, (visit(node, []) for node in sorted(graph))), [])


def test_no_module_imports_itself_by_way_of_others():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert not circle({name: imported_modules(path) for name, path in MODULES.items()})


def test_folders_import_downward():
    """A sub-folder counts as one: no two of them, and no module above, import each other in turn."""

    def place(name: str) -> str:
        path = MODULES[name]
        return ".".join(path.parts[:-1]) if len(path.parts) > 2 else name

    graph: dict[str, set[str]] = {place(name): set() for name in MODULES}
    for name, path in MODULES.items():
        graph[place(name)] |= {place(other) for other in imported_modules(path)} - {place(name)}
    assert not circle(graph)


def test_the_trainer_is_a_picture_and_each_folder_asks_its_question():
    entries = {path.parts[1] for path in FILES if path.parts[0] == "trainer"} | {"py.typed"}
    assert len(entries) <= TOP_OF_TRAINER, sorted(entries)
    for path in FILES:
        if path.name == "__init__.py" and len(path.parts) > 2:
            assert "?" in (ast.get_docstring(tree(path)) or ""), f"{path} does not say what it answers"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_names_of_a_runs_files_stand_in_the_layout(path: Path):
    from trainer.run_folder import layout

    if path == Path("trainer/run_folder/layout.py") or path.parts[0] not in ("trainer", "cluster"):
        return
    names = [value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)]
    words = {layout.CHECKPOINTS, layout.PROFILE}  # which texts may say, too
    sayings = docstrings(tree(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in sayings:
            told = [name for name in names if name == node.value or ("." in name and name in node.value)]
            assert set(told) <= words, f"{path}:{node.lineno} spells {told}; take it from run_folder.layout"


def private_names(path: Path) -> set[str]:
    """The private names that a file defines: of functions, classes, attributes and variables."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


PRIVATE = {path: private_names(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_is_private_to_a_module_stays_there(path: Path):
    elsewhere = set().union(*(names for other, names in PRIVATE.items() if other != path)) - PRIVATE[path]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BELOW:
            assert not [alias.name for alias in node.names if alias.name.startswith("_")], f"{path}"
        if isinstance(node, ast.Attribute) and node.attr in elsewhere:
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            is_super = isinstance(node.value, ast.Call)
            assert is_own or is_super, f"{path}:{node.lineno} uses {node.attr}, private to another module"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downward(path: Path):
    package = path.parts[0]
    others = set(imports(path)) & BELOW.keys() - {package}
    assert others <= BELOW[package], f"{path} imports {others - BELOW[package]}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_foreign_libraries_are_imported_in_their_homes(path: Path):
    for library, homes in HOMES.items():
        if library in imports(path):
            assert any(path.match(home) for home in homes), f"{path} imports {library}; only {homes} may"


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

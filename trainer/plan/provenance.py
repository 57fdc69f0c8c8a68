"""Where a run's numbers come from besides its recipe: the code that computes them and the data they are of.

A checkpoint's manifest holds both, so that a run is only resumed by the same code on the same data, unless
its user accepts the differences that are shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.plan.inputs import Inputs
from trainer.recipe.redaction import hidden_in
from trainer.recipe.schema import Recipe

OURS = ("optim", "data_echo", "trainer", "cluster")
Provenance = dict[str, dict[str, Any]]  # "code" and "data", each flat: what -> its version, digest or number


def of(recipe: Recipe, inputs: Inputs) -> Provenance:
    """The code and the data of a run.

    Code is this project and torch by their versions, and the Python files of the package that holds the task,
    one digest each (of this project's packages: one in all). Data is what each source tells of itself, or
    only its length.
    """
    return {"code": _code(recipe.task.use), "data": hidden_in(_data(inputs))}


def differences(before: Provenance, now: Provenance, what: str) -> list[str]:
    """What is not the same in `what`, the code or the data; nothing where nobody knows what it was."""
    if not isinstance(before.get(what), dict):
        return []
    old, new = before[what], now[what]
    return [
        f"{what}: {key}: is {new.get(key, 'gone')}, and the checkpoint was made with {old.get(key, 'none')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _code(use: str) -> dict[str, str]:
    top = use.partition(":")[0].partition(".")[0]
    digests = {package: _digest(path for _, path in _files(package)) for package in OURS}
    if top not in OURS:
        digests |= {name: _digest([path]) for name, path in _files(top)}
    versions = {
        "lockstep-training": version("lockstep-training"),
        "torch": version("torch").partition("+")[0],
    }
    return versions | digests


def _files(package: str) -> Iterator[tuple[str, Path]]:
    """The Python files of a package or a module, by name and in order."""
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).name, Path(spec.origin)
        return
    for folder in map(Path, spec.submodule_search_locations):
        for path in sorted(folder.rglob("*.py")):
            yield f"{package}/{path.relative_to(folder).as_posix()}", path


def _digest(paths: Any) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _data(inputs: Inputs) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for split, source in inputs.sources.items():
        fingerprint = source.fingerprint() if hasattr(source, "fingerprint") else {}
        described |= _flat({"examples": len(source)} | fingerprint, split)
    return described


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Nested dicts and lists as one dict with dotted names, so that a difference is shown where it is."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{name}.{key}")
    return flat

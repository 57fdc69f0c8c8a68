"""Reads a recipe from YAML and refuses all of its mistakes at once, each with its line.

The loader reads YAML 1.2's plain values: `3e-4` is a number, `on` and `1:30` are strings. Keys are strings,
and a key given twice is refused. pydantic checks types and ranges (`trainer.recipe.schema`), `optim` the
hyperparameters of its rules, and `recipe.CONTRADICTIONS` what several keys say together.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from trainer.errors import Problem, RecipeError, UserError
from trainer.recipe import hyperparameters, messages
from trainer.recipe.durations import SavingInterval
from trainer.recipe.schema import CONTRADICTIONS, SECTIONS, Contradiction, Recipe

Place = tuple[str, int | None]  # file, line
OVERRIDE = "--set"  # the file of what the command line sets


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file at `path`, with `key.sub=value` overrides.

    Raises:
        RecipeError: with every mistake.
        UserError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"{path}: cannot be read ({cause}); give the path of a recipe, a YAML file"
        ) from error
    return parse(text, str(path), overrides)


def parse(text: str, file: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `text`; `file` is the name that messages give it. RecipeError has every mistake."""
    draft = _Draft.of(text, file)
    for override in overrides:
        draft.override(override)
    return draft.recipe()


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `parse` gives the same recipe back."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )


@dataclass
class _Draft:
    """What the YAML says, not yet a recipe: plain values, where each key stands, the problems met so far."""

    values: dict[str, Any]
    places: dict[str, Place]
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def of(cls, text: str, file: str) -> "_Draft":
        draft = cls({}, {"": (file, 1)})
        node = _compose(text, file)
        if not isinstance(node, yaml.MappingNode):
            kind = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}.get(type(node), "empty")
            right = "write sections with keys, such as `batch: {size: 512, micro: 64}`"
            raise RecipeError([Problem(file, 1, "", f"the recipe is {kind}", right)])
        draft.values = draft.construct(node, "", file)
        return draft

    def construct(self, node: yaml.Node, key: str, file: str) -> Any:
        """The node's plain value; remembers the place of every key below `key`."""
        place = (file, None if file == OVERRIDE else node.start_mark.line + 1)
        if node.tag not in _PLAIN_TAGS:
            self.problems.append(Problem(*place, key, f"has the tag {node.tag}", "write a plain value"))
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.construct(item, _join(key, number), file) for number, item in enumerate(node.value)]
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            here = _join(key, name)
            line = None if file == OVERRIDE else name_node.start_mark.line + 1
            if name in values:
                first = self.places[here][1]
                self.problems.append(
                    Problem(file, line, here, f"is given twice, first in line {first}", "keep one")
                )
            self.places[here] = (file, line)
            values[name] = self.construct(value_node, here, file)
        return values

    def override(self, text: str) -> None:
        """Set one key from `key.sub=value`, the value as YAML. A length's new unit replaces its old one."""
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            self.problems.append(
                Problem(OVERRIDE, None, "", f"{text!r} is no override", "write key.sub=value")
            )
            return
        *sections, name = key.split(".")
        values = self.values
        for depth, section in enumerate(sections, start=1):
            if not isinstance(values.get(section), dict):
                values[section] = {}
                self.places[".".join(sections[:depth])] = (OVERRIDE, None)
            values = values[section]
        if name in SavingInterval.UNITS and sections[:1] != ["task"]:  # whose arguments are its own
            for unit in SavingInterval.UNITS:
                values.pop(unit, None)
        self.places = {k: place for k, place in self.places.items() if not k.startswith(f"{key}.")}
        self.places[key] = (OVERRIDE, None)
        node = _compose(value, OVERRIDE)
        values[name] = None if node is None else self.construct(node, key, OVERRIDE)

    def recipe(self) -> Recipe:
        """The recipe, every default written out; RecipeError with every problem, in the order of the file."""
        section = self.values.get("optimizer")
        if isinstance(section, dict) and isinstance(section.get("name"), str):
            self.note(hyperparameters.contradictions(section))
            given = {key: value for key, value in section.items() if key != "lr" or value is not None}
            self.values["optimizer"] = hyperparameters.published(section["name"]) | given
        try:
            recipe = Recipe.model_validate(self.values)
        except ValidationError as error:
            self.note(messages.contradictions(error.errors()))
        self.note(self.contradictions())
        if self.problems:
            raise RecipeError(sorted(self.problems, key=lambda problem: problem.line or 0))
        recipe.remember(self.places)
        return recipe

    def note(self, contradictions: Iterator[Contradiction] | list[Contradiction]) -> None:
        """Keep contradictions as problems, each at the place of its key or of the section that misses it."""
        for key, wrong, right in contradictions:
            known = key
            while known not in self.places:
                known = known.rpartition(".")[0]
            self.problems.append(Problem(*self.places[known], key, wrong, right))

    def contradictions(self) -> Iterator[Contradiction]:
        """What valid sections say against each other, whether or not other sections are valid."""
        for check in CONTRADICTIONS:
            names = inspect.signature(check).parameters
            try:
                sections = [SECTIONS[(name,)].model_validate(self.values.get(name, {})) for name in names]
            except ValidationError:
                continue  # noted with the section itself
            yield from check(*sections)


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


class _Plain(NamedTuple):
    """One kind of plain scalar as YAML 1.2's core schema has it."""

    tag: str
    pattern: str
    first: str
    convert: Callable[[str], Any]


_PLAIN = (
    _Plain("null", r"~|null|Null|NULL|", "~nN\0", lambda text: None),
    _Plain("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    _Plain("int", r"[-+]?[0-9]+", "-+0123456789", int),
    _Plain("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789", float),
    _Plain(
        "float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.", lambda text: float(text.replace(".", ""))
    ),
)


def _scalar(node: yaml.ScalarNode) -> Any:
    if node.style is None:  # not quoted
        for plain in _PLAIN:
            if re.fullmatch(plain.pattern, node.value):
                return plain.convert(node.value)
    return node.value


def _compose(text: str, file: str) -> yaml.Node | None:
    """The tree of nodes; BaseLoader resolves nothing, so that `_scalar` sees what was written."""
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark and file != OVERRIDE else None
        wrong = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise RecipeError([Problem(file, line, "", f"is not YAML: {wrong}", "correct the line")]) from error


class _Dumper(yaml.SafeDumper):
    """Quotes every string that this loader or YAML 1.1 would read as something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Plain or quoted as PyYAML chooses, but escaped where it would lose a line break of Unicode's."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)
for _kind in _PLAIN:
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind.tag}", re.compile(rf"^(?:{_kind.pattern})$"), list(_kind.first)
    )

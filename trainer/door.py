"""The door: reads a recipe from YAML and refuses all of its mistakes at once, each with its line.

The loader reads YAML 1.2's plain values: `3e-4` is a number, `on` and `1:30` are strings. Keys are strings,
and a key given twice is refused. pydantic checks types and ranges (`trainer.recipe`), `optim` the
hyperparameters of its rules, and `recipe.CONTRADICTIONS` what several keys say together.
"""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.errors import Problem, RecipeError, Refusal
from trainer.recipe import CONTRADICTIONS, SECTIONS, Recipe, Section

Place = tuple[str, int | None]  # file, line
UNITS = ("examples", "epochs", "steps", "share", "minutes")


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file at `path`, with `key.sub=value` overrides; RecipeError names every mistake.

    Raises:
        Refusal: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "not UTF-8 text"
        raise Refusal(f"{path}: cannot be read ({cause}); give the path of a recipe, a YAML file") from error
    return parse(text, str(path), overrides)


def parse(text: str, file: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `text`; `file` is the name that messages give it."""
    draft = _Draft.of(text, file)
    for override in overrides:
        draft.override(override)
    return draft.recipe()


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `parse` gives the same recipe back."""
    return yaml.dump(
        recipe.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=110,
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
            kind = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value", type(None): "empty"}[
                type(node)
            ]
            raise RecipeError(
                [Problem(file, 1, "", f"the recipe is {kind}", "write sections, such as `batch:`")]
            )
        draft.values = draft.construct(node, "", file)
        return draft

    def construct(self, node: yaml.Node, key: str, file: str, numbered: bool = True) -> Any:
        """The node's plain value; remembers the place of every key below `key`."""
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self.construct(item, _join(key, i), file, numbered) for i, item in items]
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            line = name_node.start_mark.line + 1 if numbered else None
            here = _join(key, name)
            if name in values:
                first = self.places[here][1]
                self.problems.append(
                    Problem(file, line, here, f"is given twice, first in line {first}", "keep one")
                )
            self.places[here] = (file, line)
            values[name] = self.construct(value_node, here, file, numbered)
        return values

    def override(self, text: str) -> None:
        """Set one key from `key.sub=value`, the value as YAML. A length's new unit replaces its old one."""
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            self.problems.append(
                Problem("--set", None, "", f"{text!r} is no override", "write key.sub=value")
            )
            return
        *sections, name = key.split(".")
        values = self.values
        for i, section in enumerate(sections):
            if not isinstance(values.get(section), dict):
                values[section] = {}
                self.places[".".join(sections[: i + 1])] = ("--set", None)
            values = values[section]
        if name in UNITS:
            for unit in UNITS:
                values.pop(unit, None)
        self.places[key] = ("--set", None)
        node = _compose(value, "--set")
        values[name] = None if node is None else self.construct(node, key, "--set", numbered=False)

    def recipe(self) -> Recipe:
        """The recipe, or RecipeError with every problem in the order of the file."""
        self.problems += self.optimizer_problems()
        try:
            recipe = Recipe.model_validate(self.values)
        except ValidationError as error:
            self.problems += _merged([self.problem(details) for details in error.errors()])
        self.problems += self.contradictions()
        if self.problems:
            raise RecipeError(sorted(self.problems, key=lambda p: p.line or 0))
        recipe._places.update(self.places)
        return recipe

    def contradictions(self) -> Iterator[Problem]:
        """What valid sections say against each other, whether or not other sections are valid."""
        for check in CONTRADICTIONS:
            try:
                needed = [
                    SECTIONS[(name,)].model_validate(self.values.get(name, {}))
                    for name in inspect.signature(check).parameters
                ]
            except ValidationError:
                continue  # reported with the section itself
            for key, wrong, right in check(*needed):
                yield Problem(*self.place(key), key, wrong, right)

    def optimizer_problems(self) -> Iterator[Problem]:
        """Check the rule's own hyperparameters and write out the published defaults of those not given."""
        import optim  # brings torch

        section = self.values.get("optimizer")
        if not isinstance(section, dict) or "name" not in section:
            return
        name, place = section["name"], self.place("optimizer.name")
        if name not in optim.names():
            right = _nearest(str(name), optim.names()) or f"the names are {', '.join(optim.names())}"
            yield Problem(*place, "optimizer.name", f"is {name!r}, an unknown optimizer", right)
            return
        published = optim.hyperparameters(name)
        common = SECTIONS[("optimizer",)].model_fields
        known = {*published, *common}
        for key in section.keys() - known:
            right = _nearest(key, known) or f"{name} has {', '.join(sorted(known))}"
            yield Problem(*self.place(f"optimizer.{key}"), f"optimizer.{key}", f"is unknown to {name}", right)
        given = {key: value for key, value in section.items() if key != "lr" or value is not None}
        published = {
            key: list(value) if isinstance(value, tuple) else value for key, value in published.items()
        }
        self.values["optimizer"] = published | given
        hyper = {key: value for key, value in (published | given).items() if key in published}
        yield from self.hyperparameter_problems(name, hyper, published)

    def hyperparameter_problems(
        self, name: str, hyper: dict[str, Any], published: dict[str, Any]
    ) -> Iterator[Problem]:
        """Values of the wrong kind; when there are none, what the rule itself says of their ranges."""
        import torch

        import optim

        odd = {key: value for key, value in hyper.items() if not _same_kind(value, published[key])}
        for key, value in odd.items():
            wrong, right = f"is {value!r}", f"a value like the published one, {_plain(published[key])}"
            yield Problem(*self.place(f"optimizer.{key}"), f"optimizer.{key}", wrong, right)
        if not odd:
            try:
                weight = torch.nn.Parameter(torch.zeros(1))
                optim.build(
                    name, [weight], **{k: tuple(v) if isinstance(v, list) else v for k, v in hyper.items()}
                )
            except (ValueError, TypeError) as error:
                yield Problem(*self.place("optimizer"), "optimizer", str(error), f"see the rule of {name}")

    def problem(self, error: ErrorDetails) -> Problem:
        """One pydantic error in the door's words."""
        key, model = _locate(error["loc"])
        name = key.rpartition(".")[2]
        kind, value = error["type"], _plain(error["input"])
        context = error.get("ctx", {})
        if kind == "refused":
            wrong, right = context["wrong"], context["right"]
            key = _join(key, context["key"]) if context["key"] else key
        elif kind == "missing":
            wrong, right = "is missing", f"give {_description(model, name)}"
        elif kind == "extra_forbidden":
            wrong, right = "is an unknown key", _known(name, model)
        elif kind == "none_required":
            wrong, right = f"is {value}", "null, the only value in this version"
        elif kind in ("union_tag_not_found", "union_tag_invalid"):
            wrong = f"has shape {context['tag']}" if "tag" in context else "has no shape"
            shapes = [loc[-1] for loc in SECTIONS if ".".join(loc[:-1]) == key]
            right = f"the shapes are {', '.join(shapes)}"
            key = f"{key}.shape"
        elif kind == "string_pattern_mismatch":
            wrong, right = f"is {value}", f"give {_description(model, name)}"
        else:
            wrong = f"is {value}"
            right = error["msg"].replace("Input should be", "it should be").replace("valid tuple", "list")
        return Problem(*self.place(key), key, wrong, right)

    def place(self, key: str) -> Place:
        """Where the key stands, or else the section that it belongs in."""
        while key not in self.places:
            key = key.rpartition(".")[0]
        return self.places[key]


def _locate(loc: tuple[int | str, ...]) -> tuple[str, type[Section]]:
    """The dotted key of a pydantic location, without tags of unions, and the section that holds the key."""
    key: list[str] = []
    names: tuple[str, ...] = ()
    model = SECTIONS[()]
    for part in loc:
        if isinstance(part, int):
            key.append(str(part))
        elif names in SECTIONS:
            model = SECTIONS[names]
            key.append(part)
            names = (*names, part)
        elif (*names, part) in SECTIONS:  # the tag of a union, such as decay's shape
            names = (*names, part)
        else:  # a branch of a plain union, such as `int` of `auto or int`
            break
    return ".".join(key), model


def _description(model: type[Section], name: str) -> str:
    return next(
        (f.description or name for key, f in model.model_fields.items() if name in (key, f.alias)), name
    )


def _known(name: str, model: type[Section]) -> str:
    """What to write instead of an unknown key: the nearest known one, or its home in another section."""
    known = [f.alias or key for key, f in model.model_fields.items()]
    homes = [
        ".".join((*loc, name))
        for loc, other in SECTIONS.items()
        if other is not model and name in (f.alias or key for key, f in other.model_fields.items())
    ]
    nearest = _nearest(name, known)
    if not nearest and homes:
        return f"did you mean {homes[0]}?"
    return nearest or f"the keys here are {', '.join(known)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {matches[0]}?" if matches else ""


def _merged(problems: Sequence[Problem]) -> list[Problem]:
    """One problem per key: the branches of a union each complain, and any one of them would be right."""
    merged: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        first = merged.get((problem.key, problem.wrong))
        right = f"{first.right}, or {problem.right.removeprefix('it should be ')}" if first else problem.right
        merged[problem.key, problem.wrong] = replace(problem, right=right)
    return list(merged.values())


def _same_kind(value: object, published: object) -> bool:
    """Whether a hyperparameter's value has the form of its published default; None says nothing of it."""
    if published is None or value is None:
        return True
    if isinstance(published, bool) or isinstance(value, bool):
        return isinstance(published, bool) and isinstance(value, bool)
    if isinstance(published, int | float):
        return isinstance(value, int | float)
    if isinstance(published, tuple | list):
        numbers = isinstance(value, tuple | list) and len(value) == len(published)
        return numbers and all(map(_same_kind, value, published))  # type: ignore[arg-type]
    return isinstance(value, type(published))


def _plain(value: object) -> str:
    """A value as the recipe writes it."""
    return (
        yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    )


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


# Plain scalars as YAML 1.2's core schema has them.
_PLAIN = (
    ("null", re.compile(r"~|null|Null|NULL|"), "~nN\0", lambda text: None),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF", lambda text: text.lower() == "true"),
    ("int", re.compile(r"[-+]?[0-9]+"), "-+0123456789", int),
    (
        "float",
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        "-+.0123456789",
        lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    ),
)


def _scalar(node: yaml.ScalarNode) -> Any:
    if node.style is None:
        for _, pattern, _, convert in _PLAIN:
            if pattern.fullmatch(node.value):
                return convert(node.value.lower() if pattern is _PLAIN[3][1] else node.value)
    return node.value


def _compose(text: str, file: str) -> yaml.Node | None:
    """The tree of nodes; BaseLoader resolves nothing, so that `_scalar` sees what was written."""
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        wrong = getattr(error, "problem", None) or str(error).replace("\n", " ")
        line = mark.line + 1 if mark and file != "--set" else None
        raise RecipeError([Problem(file, line, "", f"is not YAML: {wrong}", "mend the line")]) from error


class _Dumper(yaml.SafeDumper):
    """Quotes every string that this door or YAML 1.1 would read as something else."""


for _kind, _pattern, _first, _ in _PLAIN:
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern.pattern})$"), list(_first)
    )

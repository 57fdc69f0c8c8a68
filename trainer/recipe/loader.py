"""Reads a recipe from YAML and refuses all of its mistakes at once, each with its line.

The loader reads YAML 1.2's plain values: `3e-4` is a number, `on` and `1:30` are strings. Keys are strings,
and a key given twice is refused. pydantic checks types and ranges (`trainer.recipe.schema`), `optim` the
hyperparameters of its rules, and `recipe.CONTRADICTIONS` what several keys say together.

What is read is bounded in size, depth and number of values, aliases counted as often as they stand for
something: any text is answered at once and within little memory.
"""

import inspect
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError

from trainer.errors import Problem, RecipeError, UserError
from trainer.recipe import hyperparameters, messages
from trainer.recipe.durations import SavingInterval, Section
from trainer.recipe.schema import CONTRADICTIONS, SECTIONS, Contradiction, Recipe, sections

Place = tuple[str, int | None]  # file, line
Checked = TypeVar("Checked", bound=Section)
OVERRIDE = "--set"  # the file of what the command line sets
MOST_CHARACTERS = 2**17
MOST_VALUES = 5000
MOST_DEPTH = 24
MOST_DIGITS = 300  # of a number, since larger ones are infinite, and characters of a key
MOST_PROBLEMS = 100  # that are told
_WITH_OWN_NAMES = (["task"], ["optimizer"])  # sections whose keys may be called like a unit of length
_PART = r"""\w+|"[^"]*"|'[^']*'"""  # of an override's key


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file at `path`, with `key.sub=value` overrides.

    Raises:
        RecipeError: with every mistake.
        UserError: the file cannot be read.
    """
    return parse(text_of(path, "a recipe"), str(path), overrides)


def text_of(path: str | Path, what: str) -> str:
    """The text of a YAML file that is to be `what`. UserError where it cannot be read."""
    try:
        return _text(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError) as error:
        cause = getattr(error, "strerror", None) or (
            "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        )
        raise UserError(f"{path}: cannot be read ({cause}); give the path of {what}, a YAML file") from error


def _text(path: Path) -> str:
    """A file's text, or what shows that it is too long. A pipe or a device might never end: ValueError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("no plain file")
        content = file.read(4 * MOST_CHARACTERS + 1)
    if len(content) > 4 * MOST_CHARACTERS:
        raise ValueError(f"more than {MOST_CHARACTERS} characters")
    return content.decode()


def parse(text: str, file: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `text`; `file` is the name that messages give it. RecipeError has every mistake."""
    draft = Draft.of(text, file)
    for override in overrides:
        draft.override(override)
    return draft.recipe()


def of_values(values: dict[str, Any], name: str) -> Recipe:
    """The recipe of plain values that no file holds; `name` is what messages call them."""
    return Draft(values, {"": (name, None)}).recipe()


def dump(section: Section) -> str:
    """A recipe (or a sweep) as YAML, every default written out; reading it gives the same one back."""
    values = section.model_dump(mode="json")
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )


@dataclass
class Draft:
    """What the YAML says, not yet checked: plain values, where each key stands, the problems met so far."""

    values: dict[str, Any]
    places: dict[str, Place]
    problems: list[Problem] = field(default_factory=list)
    values_read: int = 0

    @classmethod
    def of(cls, text: str, file: str) -> "Draft":
        draft = cls({}, {"": (file, 1)})
        node = _compose(text, file)
        if not isinstance(node, yaml.MappingNode):
            kind = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}.get(type(node), "empty")
            right = "write sections with keys, such as `batch: {size: 512, micro: 64}`"
            raise RecipeError([Problem(file, 1, "", f"the recipe is {kind}", right)])
        draft.values = draft.construct(node, "", file)
        return draft

    def construct(self, node: yaml.Node, key: str, file: str, depth: int = 0) -> Any:
        """The node's plain value; remembers the place of every key below `key`."""
        place = (file, None if file == OVERRIDE else node.start_mark.line + 1)
        self.values_read += 1
        if self.values_read > MOST_VALUES or depth > MOST_DEPTH:
            much = f"{MOST_VALUES} values" if depth <= MOST_DEPTH else f"{MOST_DEPTH} levels"
            raise RecipeError([Problem(*place, key, f"leads to more than {much}", "write less, or no alias")])
        if node.tag not in _PLAIN_TAGS:
            self.problems.append(Problem(*place, key, f"has the tag {node.tag}", "write a plain value"))
        if isinstance(node, yaml.ScalarNode):
            value, halves = _scalar(node)
            if halves:
                self.problems.append(Problem(*place, key, *halves))
            return value
        if isinstance(node, yaml.SequenceNode):
            numbered = enumerate(node.value)
            return [self.construct(item, _join(key, number), file, depth + 1) for number, item in numbered]
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            line = None if file == OVERRIDE else name_node.start_mark.line + 1
            name = name_node.value
            if not isinstance(name, str) or _unfit(name) or len(name) > MOST_DIGITS:
                wrong = f"has a key that is no text of at most {MOST_DIGITS} characters"
                self.problems.append(Problem(file, line, key, wrong, "write a name"))
                continue
            here = _join(key, name)
            if name in values:
                first = self.places[here][1]
                self.problems.append(
                    Problem(file, line, here, f"is given twice, first in line {first}", "keep one")
                )
            self.places[here] = (file, line)
            values[name] = self.construct(value_node, here, file, depth + 1)
        return values

    def override(self, text: str) -> None:
        """Set one key from `key.sub=value`, the value as YAML. A length's new unit replaces its old one."""
        match = re.fullmatch(rf"((?:{_PART})(?:\.(?:{_PART}))*)=(.*)", text, re.DOTALL)
        parts = [part.strip("\"'") for part in re.findall(_PART, match[1])] if match else []
        if match is None or len(parts) > MOST_DEPTH or any(len(p) > MOST_DIGITS or _unfit(p) for p in parts):
            wrong, right = f"{messages.shortened(repr(text))} is no override", "write key.sub=value"
            self.problems.append(Problem(OVERRIDE, None, "", wrong, f"{right}, a key with dots in quotes"))
            return
        key, value = ".".join(parts), match[2]
        *sections, name = parts
        values = self.values
        for depth, section in enumerate(sections, start=1):
            if not isinstance(values.get(section), dict):
                values[section] = {}
                self.places[".".join(sections[:depth])] = (OVERRIDE, None)
            values = values[section]
        if name in SavingInterval.UNITS and sections[:1] not in _WITH_OWN_NAMES:
            for unit in SavingInterval.UNITS:
                values.pop(unit, None)
        self.places = {k: place for k, place in self.places.items() if not k.startswith(f"{key}.")}
        self.places[key] = (OVERRIDE, None)
        node = _composed_override(value, key)
        values[name] = None if node is None else self.construct(node, key, OVERRIDE)

    def recipe(self) -> Recipe:
        """The recipe, every default written out; RecipeError with every problem, in the order of the file."""
        section = self.values.get("optimizer")
        if isinstance(section, dict) and isinstance(section.get("name"), str):
            self.note(hyperparameters.contradictions(section))
            given = {key: value for key, value in section.items() if key != "lr" or value is not None}
            self.values["optimizer"] = hyperparameters.published(section["name"]) | given
        recipe = self.checked(Recipe, self.contradictions)
        recipe.remember(self.places)
        return recipe

    def checked(self, model: type[Checked], contradictions: Callable[[], Iterator[Contradiction]]) -> Checked:
        """The values as `model`; RecipeError with every problem, those of `contradictions` among them."""
        try:
            made = model.model_validate(self.values)
        except ValidationError as error:
            self.note(messages.contradictions(error.errors()[:MOST_PROBLEMS], dict(sections(model))))
        self.note(contradictions())
        if self.problems:
            told = sorted(self.problems, key=lambda problem: problem.line or 0)[:MOST_PROBLEMS]
            raise RecipeError(told)
        return made

    def lay_over(self, other: "Draft") -> None:
        """Take over the sections of another draft: key by key, but another optimizer's section as a whole."""
        for name, section in other.values.items():
            mine = self.values.get(name)
            is_whole = not (isinstance(mine, dict) and isinstance(section, dict))
            is_whole = is_whole or (name == "optimizer" and "name" in section)
            self.values[name] = deepcopy(section if is_whole else mine | section)
        self.places |= {key: place for key, place in other.places.items() if key}

    def copy(self) -> "Draft":
        """Another draft that says the same."""
        return Draft(deepcopy(self.values), dict(self.places), list(self.problems))

    def part(self, key: str) -> "Draft":
        """What the section at a key says, as a draft of its own."""
        prefix = f"{key}."
        places = {k.removeprefix(prefix): place for k, place in self.places.items() if k.startswith(prefix)}
        return Draft(deepcopy(self.at(key)), {"": self.places.get(key, self.places[""])} | places)

    def at(self, key: str) -> dict[str, Any]:
        """The section at a key; an empty one where there is none."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    def note(self, contradictions: Iterator[Contradiction] | list[Contradiction]) -> None:
        """Keep contradictions as problems, each at the place of its key or of the section that misses it."""
        unread = {problem.key for problem in self.problems}
        for key, wrong, right in islice(contradictions, MOST_PROBLEMS):
            if key in unread:
                continue
            known = key
            while known not in self.places:
                known = known.rpartition(".")[0]
            self.problems.append(Problem(*self.places[known], key, wrong, right))

    def contradictions(self) -> Iterator[Contradiction]:
        """What valid sections say against each other, whether or not other sections are valid."""
        for check in CONTRADICTIONS:
            names = inspect.signature(check).parameters
            try:
                valid = [SECTIONS[(name,)].model_validate(self.values.get(name, {})) for name in names]
            except ValidationError:
                continue  # noted with the section itself
            yield from check(*valid)


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


def _scalar(node: yaml.ScalarNode) -> tuple[Any, tuple[str, str] | None]:
    """A scalar's value, and what is wrong with it and what would be right, if anything is."""
    if _unfit(node.value):
        return "", ("holds half a character (a surrogate), which no file can keep", "write the whole one")
    if node.style is None:  # not quoted
        for plain in _PLAIN:
            if re.fullmatch(plain.pattern, node.value):
                if plain.tag == "int" and len(node.value) > MOST_DIGITS:
                    return 0, (f"has {len(node.value)} digits", f"give at most {MOST_DIGITS}")
                value = plain.convert(node.value)
                if (
                    plain.tag == "float"
                    and value in (math.inf, -math.inf)
                    and "inf" not in node.value.lower()
                ):
                    wrong = f"is {messages.shortened(node.value)}, more than a number can hold"
                    return 0.0, (wrong, "give a smaller one, or .inf")
                return value, None
    return node.value, None


def _unfit(text: str) -> bool:
    """Whether a text cannot be written down: it holds half of a surrogate pair."""
    return any("\ud800" <= character <= "\udfff" for character in text)


class _Loader(yaml.BaseLoader):
    """Resolves nothing, so that `_scalar` sees what was written, and goes down so far only."""

    depth = nodes = 0

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        self._refuse_depth(self.flow_level, self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        self._refuse_depth(self.depth, mark)
        self.nodes += 1
        if self.nodes > 2 * MOST_VALUES:  # keys are nodes, too
            raise yaml.MarkedYAMLError(problem=f"it has more than {MOST_VALUES} values", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    @staticmethod
    def _refuse_depth(depth: int, mark: Any) -> None:
        if depth > MOST_DEPTH:
            problem = f"it is nested more than {MOST_DEPTH} levels deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _compose(text: str, file: str, key: str = "") -> yaml.Node | None:
    """The tree of nodes."""
    if len(text) > MOST_CHARACTERS:
        wrong, line = f"has {len(text)} characters", None if file == OVERRIDE else 1
        raise RecipeError([Problem(file, line, key, wrong, f"write at most {MOST_CHARACTERS}")])
    try:
        return yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two for \UFFFFFFFF
        mark = getattr(error, "problem_mark", None)
        position = getattr(error, "position", 0)  # of a character that YAML does not allow
        line = None if file == OVERRIDE else mark.line + 1 if mark else text.count("\n", 0, position) + 1
        wrong = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise RecipeError([Problem(file, line, key, f"is not YAML: {wrong}", "correct the line")]) from error


def _composed_override(value: str, key: str) -> yaml.Node | None:
    """The tree of an override's value. A command line has no comments: `#fff` and `no #1` are texts."""
    node = _compose(value, OVERRIDE, key)
    is_plain = node is None or (isinstance(node, yaml.ScalarNode) and node.style is None)
    if is_plain and re.search(r"(^|\s)#", value) and value.lstrip()[0] not in "!&*":
        return yaml.ScalarNode("tag:yaml.org,2002:str", value.strip(), style="'")
    return node


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

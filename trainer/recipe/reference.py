"""docs/recipe.md, made from the recipe's models: `python -m trainer.recipe.reference > docs/recipe.md`."""

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from trainer.recipe.durations import Duration, SavingInterval, Section
from trainer.recipe.messages import plain
from trainer.recipe.schema import SECTIONS

UNITS = set(SavingInterval.UNITS)

INTRODUCTION = """\
# The recipe

One YAML file says everything about a run; `lockstep check RECIPE` shows it resolved, with its plan.
This page is made from the models in `trainer/recipe/` by `python -m trainer.recipe.reference`;
`lockstep schema` prints them as a JSON Schema for editors.

* Everything not given has its default. An unknown key, a key given twice and a value out of range
  are refused, all at once, each as `file:line: key: what is wrong; what would be right`.
* `--set key.sub=value` overrides one key, with the value as YAML; a length's new unit replaces its
  old one. A key that holds dots stands in quotes: `--set 'optimizer.lr_multipliers."head.*"=2'`. A
  command line has no comments: `--set task.with.colour=#fff` sets the text `#fff`.
* A recipe has at most 131,072 characters and 5,000 values, nested at most 24 deep, aliases counted as
  often as they stand for something. What outlasts training (a warm-up, a milestone) is refused, too.
* `init.from`, `checkpoint.dir`, `checkpoint.mirror` and `track.uri` take one path each: `~` is the home
  folder; patterns (`*`, `?`, `{000..003}`) are refused. Files of data (`task.with`) may be patterns.
* A length is given in one unit: `{examples: n}`, `{epochs: n}`, `{steps: n}` or `{share: n}`. An
  epoch serves as many examples as the training data has, echoes included; a step counts as
  `batch.size` examples; a share is of the whole training.
* Plain values are read as YAML 1.2 has them: `3e-4` is a number, `on`, `no` and `1:30` are text.
* `run`, `track` and `checkpoint` never change what is computed, and may change when a run is
  resumed.
* `optimizer` also takes the hyperparameters of its rule, by the names in `docs/optimizers.md`.
"""


def markdown() -> str:
    """The whole page."""
    pages = [
        "\n".join(_page(loc, model)) for loc, model in SECTIONS.items() if set(model.model_fields) - UNITS
    ]
    return "\n".join([INTRODUCTION, *pages])


def _page(loc: tuple[str, ...], model: type[Section]) -> Iterator[str]:
    *parent, last = loc or ("Top level",)
    is_shape = bool(parent) and tuple(parent) not in SECTIONS
    yield f"## {'.'.join(parent)}, shape {last}\n" if is_shape else f"## {'.'.join([*parent, last])}\n"
    yield f"{' '.join((model.__doc__ or '').split())}\n"
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    if issubclass(model, Duration):
        units = ", ".join(f"`{unit}`" for unit in model.UNITS)
        yield f"| {units} | a length in one unit | required | how long |"
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        key = field.alias or name
        if not (issubclass(model, Duration) and key in UNITS):
            yield f"| `{key}` | {_values(properties[key])} | {_default(field)} | {field.description} |"
    yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if isinstance(default, Section):
        default = default.model_dump(mode="json", exclude_defaults=True)
        return f"`{plain(default)}`" if default else ""
    return f"`{plain(default)}`"


def _values(schema: dict[str, Any]) -> str:
    """What a key accepts, from its JSON Schema."""
    if "anyOf" in schema or "oneOf" in schema:
        branches = [_values(branch) for branch in schema.get("anyOf", []) + schema.get("oneOf", [])]
        return " or ".join(dict.fromkeys(filter(None, branches)))
    if "$ref" in schema:
        return "a length" if schema["$ref"].endswith(("/Duration", "Interval")) else "a section"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = {
        "integer": "integer",
        "number": "number",
        "string": "text",
        "array": "list",
        "object": "keys and values",
    }
    kind |= {"boolean": "true or false", "null": "null"}
    text = kind.get(schema.get("type", ""), "")
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[bound]:g}" for bound, sign in bounds.items() if bound in schema]
    return " ".join([text, ", ".join(limits)]).strip()


if __name__ == "__main__":
    print(markdown(), end="")

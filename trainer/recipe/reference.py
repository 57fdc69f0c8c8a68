"""docs/recipe.md and docs/sweep.md, from the models: `python -m trainer.recipe.reference > docs/recipe.md`
and `python -m trainer.recipe.reference sweep > docs/sweep.md`.
"""

import sys
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from trainer.recipe.durations import Duration, SavingInterval, Section
from trainer.recipe.messages import plain
from trainer.recipe.schema import SECTIONS, Sections, sections
from trainer.recipe.sweep import Sweep

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

OF_SWEEPS = """\
# The sweep

One YAML file says what a scaling experiment tries: `lockstep sweep SWEEP` runs it, `--dry-run` shows it.
This page is made from the models in `trainer/recipe/` by `python -m trainer.recipe.reference sweep`;
`lockstep schema --sweep` prints them as a JSON Schema for editors. [scaling](scaling.md) walks through one.

* An arm is the recipe with some of its sections changed: key by key, but another optimizer's section as a
  whole. `also` makes one more axis of each of the recipe's keys that it names, such as `echo.factor`.
* At each batch a micro-batch has the most examples that divide the batch and are no more than the recipe's
  own, and so has a group of batch norm within it; lanes stay; a group has as many of the recipe's workers
  as the batch has work for. Evaluations keep the recipe's block, whatever the batch.
* `carry` says what follows the batch from the recipe's own, r times as large: `beta1`, `beta2` and
  `momentum` by `tokens` (to the power of r: the half-life in examples stays) or `steps`; `weight_decay` by
  `linear` (times r), `sqrt` or `fixed`; `warmup` by `examples` or `steps`. What is not named stays.
* The search sets the peak rate of each trial: `schedule.scale` takes no part.
* A trial trains to the target, measured after 1, 2, 3 … steps and then at steps that grow by `growth`; the
  steps to target are interpolated between the last two, in logarithms of steps. It is `stopped` after
  `stop.after_best` times the steps of the best one (a lower bound), `diverged`, or `unreached` at the end of
  its recipe. Validation chooses; the test split is measured for reported trials, once.
* What is proposed depends on the completed rounds of its own search alone: not on clocks, and not on the
  number of groups.
"""


def markdown() -> str:
    """The page of the recipe."""
    return _whole(INTRODUCTION, SECTIONS)


def markdown_of_sweeps() -> str:
    """The page of the sweep."""
    return _whole(OF_SWEEPS, dict(sections(Sweep)))


def _whole(introduction: str, known: Sections) -> str:
    pages = [
        "\n".join(_page(loc, model, known)) for loc, model in known.items() if set(model.model_fields) - UNITS
    ]
    return "\n".join([introduction, *pages])


def _page(loc: tuple[str, ...], model: type[Section], known: Sections) -> Iterator[str]:
    *parent, last = loc or ("Top level",)
    is_shape = bool(parent) and tuple(parent) not in known
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
    print(markdown_of_sweeps() if sys.argv[1:] == ["sweep"] else markdown(), end="")

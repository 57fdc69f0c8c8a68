"""pydantic's errors as our messages: the key as it was written, what is wrong, what would be right."""

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import get_origin

from pydantic_core import ErrorDetails

from trainer.recipe.parallel import WORD_OR_SECTION
from trainer.recipe.schema import (
    NUMBER_OR_RANGE,
    SECTIONS,
    Contradiction,
    Section,
    Sections,
)

_SHOWN = 200  # characters of a value


def contradictions(errors: Sequence[ErrorDetails], sections: Sections = SECTIONS) -> list[Contradiction]:
    """One (key, what is wrong, what would be right) per mistake in a file of these sections.

    The branches of a union each complain of one value, and any of them would be right: they make one mistake.
    """
    merged: dict[tuple[str, str], str] = {}
    for error in errors:
        key, wrong, right = _in_words(error, sections)
        before = merged.get((key, wrong))
        merged[key, wrong] = f"{before}, or {right.removeprefix('it should be ')}" if before else right
    return [(key, wrong, right) for (key, wrong), right in merged.items()]


def nearest(name: object, known: Iterable[str]) -> str:
    """A question that names the nearest known name, or the list of them where none is near."""
    known, name = list(known), str(name)[:_SHOWN]
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {matches[0]}?" if matches else f"there are {', '.join(known) or 'none'}"


def plain(value: object) -> str:
    """A value nearly as a recipe writes it; a long one shortened."""
    return shortened(json.dumps(value, default=str, ensure_ascii=False))


def shortened(text: str) -> str:
    """A text, or the beginning and the end of a long one."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]} … {text[-15:]}"


def in_bytes(number: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _in_words(error: ErrorDetails, sections: Sections) -> Contradiction:
    key, model, names = _locate(error["loc"], sections)
    kind, value, context = error["type"], plain(error["input"]), error.get("ctx", {})
    name = key.rpartition(".")[2]
    match kind:
        case "refused":
            return ".".join(filter(None, (key, context["key"]))), context["wrong"], context["right"]
        case "missing":
            return key, "is missing", f"give the {_description(model, name)}"
        case "extra_forbidden":
            return key, "is an unknown key", _home(name, model, sections)
        case "none_required":
            return key, f"is {value}", "null is the only value in this version"
        case "model_attributes_type":  # of a union of sections
            return key, f"is {value}", f"give a section, one of {', '.join(_tags(key, sections))}"
        case "union_tag_not_found" | "union_tag_invalid":
            wrong = f"is {context['tag']}" if "tag" in context else "is missing"
            return (
                f"{key}.{context['discriminator'].strip(chr(39))}",
                wrong,
                nearest(context.get("tag", ""), _tags(key, sections)),
            )
        case "string_pattern_mismatch":
            return key, f"is {value}", f"give the {_description(model, name)}"
        case "model_type":
            return key, f"is {value}", f"give keys: {', '.join(_keys(sections[names]))}"
    right = error["msg"].replace("Input should be", "it should be").replace("valid tuple", "list")
    return key, f"is {value}", right


def _tags(key: str, sections: Sections) -> list[str]:
    """What tells the sections of a union apart, such as the shapes of a decay."""
    return [loc[-1] for loc in sections if ".".join(loc[:-1]) == key]


def _locate(loc: tuple[int | str, ...], sections: Sections) -> tuple[str, type[Section], tuple[str, ...]]:
    """The dotted key of a pydantic location, without tags of unions, the section that holds the key, and the
    location's names as `sections` has them.
    """
    key: list[str] = []
    names: tuple[str, ...] = ()
    model = sections[()]
    for part in loc:
        if part in (*NUMBER_OR_RANGE, *WORD_OR_SECTION):
            continue
        if isinstance(part, int):
            key.append(str(part))
        elif names in sections:
            model = sections[names]
            key.append(part)
            names = (*names, part)
        elif (*names, part) in sections:  # the tag of a union, such as decay's shape
            names = (*names, part)
        else:  # a name of the user's, or a branch of a plain union, such as `int` of `auto or int`
            field = model.model_fields.get(key[-1])
            if field is not None and get_origin(field.annotation) is dict:
                key.append(part)
            break
    return ".".join(key), model, names


def _keys(model: type[Section]) -> dict[str, str]:
    """A section's keys as the recipe writes them, with their descriptions."""
    return {field.alias or name: field.description or "" for name, field in model.model_fields.items()}


def _description(model: type[Section], name: str) -> str:
    return (_keys(model).get(name) or name).removeprefix("the ")


def _home(name: str, model: type[Section], sections: Sections) -> str:
    """What to write instead of an unknown key: the nearest one here, or its home in another section."""
    here = nearest(name, _keys(model))
    homes = [".".join((*loc, name)) for loc, other in sections.items() if name in _keys(other)]
    return f"did you mean {homes[0]}?" if homes and not here.startswith("did") else here

"""What every section of a recipe is made of: its strictness, its simple types, and lengths of training.

Each type has a largest value, far beyond any use, so that what a plan multiplies stays finite and in 64 bits.
"""

import os.path
import re
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

MOST = 10**12  # of whatever is counted
LARGEST = 1e9  # of whatever is measured
MOST_STAGES = 1000  # of a schedule
MOST_PROCESSES = 2**14
MOST_IN_A_NAME = 255  # bytes that file systems take

Count = Annotated[int, Field(gt=0, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Few = Annotated[int, Field(gt=0, le=MOST_PROCESSES)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1, max_length=2000, pattern=r"^[^\x00-\x1f\x7f]*$")]
Names = Annotated[tuple[Text, ...], Field(strict=False)]


class Section(BaseModel):
    """What all sections share: unknown keys, wrong types, infinities and later changes are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        serialize_by_alias=True,
        ser_json_inf_nan="constants",
    )


def refuse(wrong: str, right: str, key: str = "") -> PydanticCustomError:
    """An error of a section's validator, in the two halves of every message, at one of the section's keys."""
    return PydanticCustomError("refused", "{wrong}; {right}", {"wrong": wrong, "right": right, "key": key})


def _one_path(value: str) -> str:
    """A path as it is used: `~` is the home folder; what would stand for several paths is refused."""
    if re.search(r"[*?]|\{[^}]*(\.\.|,)[^}]*\}", value):
        raise refuse(f"is {value}, a pattern that may stand for many", "give one path, written out")
    scheme, slashes, path = value.partition(":///") if ":///" in value else ("", "", value)
    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise refuse(f"is {value}, and no user {home.partition('/')[0]} is known here", "write the path out")
    if "://" not in value and any(len(name.encode()) > MOST_IN_A_NAME for name in home.split("/")):
        raise refuse(f"has a name of more than {MOST_IN_A_NAME} bytes", "give a path that a disk can hold")
    return scheme + slashes + home


OnePath = Annotated[Text, AfterValidator(_one_path)]


class Duration(Section):
    """A length of training, in exactly one unit. An epoch serves as many examples as the data has."""

    UNITS: ClassVar[tuple[str, ...]] = ("examples", "epochs", "steps", "share")

    examples: Natural | None = Field(
        default=None, description="examples served to the model, echoes included"
    )
    epochs: Annotated[float, Field(ge=0, le=LARGEST)] | None = Field(
        default=None, description="times the training data's length"
    )
    steps: Natural | None = Field(default=None, description="updates of `batch.size` examples each")
    share: Share | None = Field(default=None, description="share of the whole training, from 0 to 1")

    @property
    def unit(self) -> str:
        """The one unit that is given."""
        return next(unit for unit in self.UNITS if getattr(self, unit) is not None)

    def __str__(self) -> str:
        return (
            f"{getattr(self, self.unit):g} {self.unit}"
            if self.share is None
            else f"{self.share:.3g} of training"
        )

    @model_validator(mode="after")
    def _one_unit(self) -> "Duration":
        given = [unit for unit in self.UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise refuse(f"gives {' and '.join(given) or 'no unit'}", f"give one of {', '.join(self.UNITS)}")
        return self

    @model_serializer(mode="wrap")
    def _without_other_units(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            key: value for key, value in handler(self).items() if value is not None or key not in self.UNITS
        }


Milestones = Annotated[tuple[Duration, ...], Field(strict=False, min_length=1, max_length=MOST_STAGES)]


class Interval(Duration):
    """A length that is not zero."""

    @model_validator(mode="after")
    def _not_zero(self) -> "Interval":
        if not getattr(self, self.unit):
            raise refuse("is 0", "give more than 0", self.unit)
        return self


class SavingInterval(Interval):
    """A length or a time: saving a checkpoint changes nothing, so a clock may decide when."""

    UNITS: ClassVar = (*Duration.UNITS, "minutes")

    minutes: Positive | None = Field(default=None, description="minutes of wall time")

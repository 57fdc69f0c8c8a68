"""What is kept of a run to go on from: the recipe's `checkpoint`."""

import re
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator

from trainer.recipe.durations import Count, OnePath, SavingInterval, Section, Text, refuse


def _address(value: str) -> SplitResult:
    try:
        return urlsplit(value)
    except ValueError as error:
        raise refuse(f"is {value}, no address ({error})", "write it as s3://bucket/folder") from error


class Best(Section):
    """Checkpoints that are kept for a metric of the validation split, made as soon as it is measured."""

    metric: Text = Field(description="its name, as the task gives it, or loss")
    mode: Literal["max", "min"] = Field(description="whether the largest or the smallest is best")
    keep: Count = Field(default=1, description="how many of the best are kept")


class CheckpointSection(Section):
    """What is kept to go on from."""

    every: SavingInterval = Field(default=SavingInterval(minutes=1), description="how often")
    keep: Count = Field(default=3, description="how many of the newest are kept")
    best: Best | None = Field(default=None, description="which are kept besides the newest; null: none")
    dir: OnePath = Field(default="runs", description="local folder that the runs' folders are made in")
    mirror: OnePath | None = Field(
        default=None,
        description="folder, here or at an fsspec address (s3://bucket/runs), that a copy of each checkpoint "
        "goes to, with recipe and journal; a machine without the run's folder resumes from it",
    )

    @field_validator("dir")
    @classmethod
    def _local(cls, value: str) -> str:
        if re.match(r"\w+://", value):
            raise refuse(f"is {value}, no folder of this machine", "name a local one, and this as mirror")
        return value

    @field_validator("mirror")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value and _address(value).password:
            raise refuse(
                "holds a password, and recipes are kept with their runs",
                "leave it to the environment, where the address's fsspec driver looks for it",
            )
        return value

"""The recipe's section `batch`: the global batch, its micro-batches, and the order of rows that fill them."""

import math
import sys
from typing import Annotated

from pydantic import Field, model_validator

from trainer.recipe.durations import MOST_STAGES, Count, Few, Section, refuse
from trainer.recipe.schedule import MultiplyGrowth, RampGrowth, StepsGrowth


class ShuffleSection(Section):
    """How each pass orders the training rows: one by one, or in blocks where single rows are slow to read."""

    block: Count = Field(
        default=1, description="rows that stay near each other, as in a row group; 1: none do"
    )
    window: Annotated[Count, Field(le=10**6)] = Field(
        default=16, description="blocks that are read together, their rows shuffled"
    )


class BatchSection(Section):
    """The global batch, and the micro-batches that it is computed in on any number of workers."""

    size: Count = Field(description="examples per update of the weights, over all workers")
    micro: Count = Field(description="examples per micro-batch; divides `size`")
    lanes: Few = Field(
        default=48,
        description="logical data shards, each served by one worker; the most workers there can be",
    )
    shuffle: ShuffleSection = Field(
        default=ShuffleSection(), description="how each pass orders the training rows"
    )
    growth: MultiplyGrowth | RampGrowth | StepsGrowth | None = Field(
        default=None, discriminator="shape", description="how the batch grows during training"
    )
    bn_group: Count | None = Field(
        default=None, description="examples per group of batch norm; null: the micro-batch"
    )

    @property
    def sizes(self) -> list[int]:
        """The batch of each stage of the growth, in order."""
        match self.growth:
            case MultiplyGrowth(at=at, factor=factor, max=largest):
                sizes = [self.size]
                for _ in at:
                    sizes.append(min(round(sizes[-1] * factor), largest or sys.maxsize))
                return sizes
            case RampGrowth(start=start, increment=increment):
                return [*range(start, self.size, increment), self.size]
            case StepsGrowth(sizes=later):
                return [self.size, *later]
        return [self.size]

    @property
    def largest_workers(self) -> int:
        """The most workers that each have whole lanes and, in every step, whole micro-batches."""
        return min(min(self.sizes) // self.micro, self.lanes)

    @model_validator(mode="after")
    def _ramp_rises(self) -> "BatchSection":
        if isinstance(self.growth, RampGrowth) and self.growth.start >= self.size:
            wrong = f"start is {self.growth.start}, not below size {self.size}"
            raise refuse(wrong, "start with a smaller batch, or leave growth out", "growth")
        if isinstance(self.growth, RampGrowth) and self.growth.stages(self.size) > MOST_STAGES:
            wrong = f"has {self.growth.stages(self.size)} stages"
            least = -(-(self.size - self.growth.start) // (MOST_STAGES - 1))
            raise refuse(wrong, f"give an increment of {least} or more", "growth")
        return self

    @model_validator(mode="after")
    def _divides(self) -> "BatchSection":
        for stage, size in enumerate(self.sizes):
            if size % self.micro:
                below = size // self.micro * self.micro
                sizes = " and ".join(str(near) for near in (below, below + self.micro) if near)
                micro = min(divisors(size), key=lambda d: abs(d - self.micro))
                wrong = f"is {size}" if size == self.size else f"gives stage {stage + 1} a batch of {size}"
                raise refuse(
                    f"{wrong}, and micro {self.micro} does not divide it",
                    f"the nearest sizes are {sizes}, the nearest micro is {micro}",
                    "size" if size == self.size else "growth",
                )
        return self

    @model_validator(mode="after")
    def _bn_group_divides(self) -> "BatchSection":
        if self.bn_group and self.micro % self.bn_group:
            groups = ", ".join(map(str, divisors(self.micro)))
            raise refuse(
                f"is {self.bn_group} and does not divide micro {self.micro}",
                f"give one of {groups}",
                "bn_group",
            )
        return self


def divisors(number: int) -> list[int]:
    """What divides a number, in order; found in pairs, so that even 10^12 takes no time."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})

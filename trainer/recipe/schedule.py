"""The recipe's sections for what changes during a run: the learning rate and the batch."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.recipe.durations import (
    MOST,
    MOST_STAGES,
    Count,
    Duration,
    Interval,
    Milestones,
    Positive,
    Section,
    Share,
    refuse,
)


class Scale(Section):
    """How the learning rate follows the batch: lr × (size / base_batch) ** power."""

    rule: Literal["none", "linear", "sqrt", "power"] = Field(
        default="none",
        description="none: lr as it stands; linear: power 1; sqrt: power 1/2; power: the power below",
    )
    base_batch: Count | None = Field(default=None, description="the batch that `optimizer.lr` was chosen for")
    power: Annotated[float, Field(ge=-4, le=4)] | None = Field(
        default=None, description="exponent of rule `power`"
    )

    @model_validator(mode="after")
    def _complete(self) -> "Scale":
        if self.rule != "none" and self.base_batch is None:
            right = "give the batch that optimizer.lr was chosen for"
            raise refuse(f"is missing for rule {self.rule}", right, "base_batch")
        if (self.rule == "power") != (self.power is not None):
            raise refuse(
                f"rule is {self.rule} and power is {self.power}", "give power with rule power, and only there"
            )
        return self


class WarmUp(Duration):
    """From `start` up to the full rate, over one length."""

    shape: Literal["constant", "linear", "polynomial", "exponential", "cosine"] = Field(
        default="linear",
        description="the way up; constant: stay at `start`, then jump; exponential: by equal factors",
    )
    start: Share = Field(default=0.0, description="where it starts, as a share of the full rate")
    power: Positive = Field(default=1.0, description="exponent of shape polynomial")

    @model_validator(mode="after")
    def _complete(self) -> "WarmUp":
        if self.shape in ("constant", "exponential") and self.start == 0:
            raise refuse(
                f"shape {self.shape} starts at 0 and would stay there", "give start, a share of the full rate"
            )
        if self.shape != "polynomial" and self.power != 1:
            raise refuse(
                f"power is {self.power:g} and shape is {self.shape}", "give power with shape polynomial only"
            )
        return self


class ConstantDecay(Section):
    """No decay."""

    shape: Literal["constant"] = Field(default="constant", description="the rate stays")


class StepDecay(Section):
    """The rate is multiplied by `factor` at each milestone."""

    shape: Literal["step"] = Field(description="multiply at milestones")
    at: Milestones = Field(description="the milestones, counted from the start of training")
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="what each milestone multiplies by"
    )


class CosineDecay(Section):
    """Half a cosine from the end of warm-up to the end of training."""

    shape: Literal["cosine"] = Field(description="half a cosine")
    end: Share = Field(default=0.0, description="where it ends, as a share of the full rate")


class PolynomialDecay(Section):
    """(1 - progress) ** power from the end of warm-up to the end of training."""

    shape: Literal["polynomial"] = Field(description="(1 - progress) ** power")
    power: Positive = Field(default=1.0, description="1 is a straight line, 2 is usual with LARS")
    end: Share = Field(default=0.0, description="where it ends, as a share of the full rate")
    plus_one: bool = Field(default=False, description="MLPerf's form: stretched over one step more")


class ExponentialDecay(Section):
    """Stay for `hold` after warm-up, then multiply by `factor` once per `every`, smoothly."""

    shape: Literal["exponential"] = Field(description="by equal factors")
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(description="what each `every` multiplies by")
    every: Interval = Field(
        default=Interval(epochs=1), description="the length that multiplies by `factor` once"
    )
    hold: Duration = Field(
        default=Duration(epochs=0), description="how long the full rate is kept after warm-up"
    )
    end: Share = Field(default=0.0, description="the rate never falls below this share of the full rate")


Decay = Annotated[
    ConstantDecay | StepDecay | CosineDecay | PolynomialDecay | ExponentialDecay, Field(discriminator="shape")
]


class CoolDown(Duration):
    """The last stretch of training, on top of any decay (with constant decay: warm-up-stable-decay)."""

    shape: Literal["linear", "sqrt"] = Field(
        default="linear", description="linear: 1 - progress; sqrt: 1 - √progress"
    )
    end: Share = Field(default=0.0, description="where it ends, as a share of the rate that the decay gives")


class ScheduleSection(Section):
    """The learning rate over the run, a function of the examples served."""

    scale: Scale = Field(default=Scale(), description="how the rate follows the batch")
    warmup: WarmUp | None = Field(default=None, description="the way up")
    decay: Decay = Field(default=ConstantDecay(), description="the way down")
    cooldown: CoolDown | None = Field(default=None, description="the last stretch, multiplied with the decay")


class MultiplyGrowth(Section):
    """Smith et al. 2018 (arXiv:1711.00489): grow the batch where a step decay would lower the rate."""

    shape: Literal["multiply"] = Field(description="multiply at milestones, from `batch.size` on")
    at: Milestones = Field(description="the milestones, counted from the start of training")
    factor: Annotated[float, Field(gt=1, le=1000)] = Field(
        description="what each milestone multiplies the batch by"
    )
    max: Count | None = Field(
        default=None, description="the largest batch; from there on the rate falls instead"
    )

    @model_validator(mode="after")
    def _within_bounds(self) -> "MultiplyGrowth":
        if len(self.at) * math.log(self.factor) > math.log(MOST):
            wrong = f"is {self.factor:g} at {len(self.at)} milestones, more than {MOST:.0e} in all"
            raise refuse(wrong, "give a smaller factor or fewer milestones", "factor")
        return self


class RampGrowth(Section):
    """From a smaller batch up to `batch.size` in equal increments, each for an equal stretch."""

    shape: Literal["ramp"] = Field(description="equal increments up to `batch.size`")
    start: Count = Field(description="the first batch")
    increment: Count = Field(description="what each stage adds")
    over: Duration = Field(description="the length after which the batch has its full size")

    def stages(self, size: int) -> int:
        """How many batches lead from the first one up to `size`, both included."""
        return 1 - (self.start - size) // self.increment


class StepsGrowth(Section):
    """A list of batches and where each begins."""

    shape: Literal["steps"] = Field(description="a list of stages after the first, which has `batch.size`")
    at: Milestones = Field(description="where the stages begin, counted from the start of training")
    sizes: Annotated[tuple[Count, ...], Field(strict=False, max_length=MOST_STAGES)] = Field(
        description="the batch of each stage"
    )

    @model_validator(mode="after")
    def _paired(self) -> "StepsGrowth":
        if len(self.sizes) != len(self.at):
            raise refuse(
                f"has {len(self.sizes)} batches for {len(self.at)} places", "give as many as `at`", "sizes"
            )
        return self

"""The recipe's section `train`: how long, and how each update is made."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.recipe.durations import Count, Duration, Interval, Positive, Section, Text, refuse


class Guard(Section):
    """What is done about a loss or a gradient that is not finite."""

    policy: Literal["stop", "skip", "roll_back"] = Field(
        default="stop",
        description="stop: end the run; skip: leave the update out; roll_back: to the last checkpoint",
    )
    most: Count = Field(default=3, description="skips or roll-backs before the run stops")
    rate_factor: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="what each roll-back multiplies the learning rate by from there on"
    )


class ExponentialAverage(Section):
    """An exponential moving average of the weights (EMA), updated every step."""

    kind: Literal["ema"] = Field(description="exponential moving average")
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.999, description="what is kept of the average in each step"
    )
    warmup: bool = Field(default=True, description="keep at most (1 + t) / (10 + t) after t steps")


class StochasticAverage(Section):
    """The mean of the weights at intervals of the last stretch (SWA)."""

    kind: Literal["swa"] = Field(description="mean of weights along the way")
    start: Duration = Field(default=Duration(share=0.75), description="where the last stretch begins")
    every: Interval = Field(default=Interval(epochs=1), description="how often weights join the mean")


class Target(Section):
    """A metric of the validation split that ends the run once it is reached."""

    metric: Text = Field(description="its name, as the task gives it, or loss")
    at_least: Annotated[float, Field(ge=-1e300, le=1e300)] | None = Field(
        default=None, description="reached at this value or above"
    )
    at_most: Annotated[float, Field(ge=-1e300, le=1e300)] | None = Field(
        default=None, description="reached at this value or below"
    )

    @model_validator(mode="after")
    def _one_side(self) -> "Target":
        if (self.at_least is None) == (self.at_most is None):
            raise refuse("gives both at_least and at_most, or neither", "give one of them")
        return self

    @property
    def value(self) -> float:
        """What the metric is to come to."""
        return self.at_least if self.at_least is not None else (self.at_most or 0.0)

    def reached(self, value: float) -> bool:
        """Whether a value of the metric is good enough."""
        return value >= self.value if self.at_least is not None else value <= self.value


class Budget(Section):
    """What ends the run before its length, whichever comes first. Schedules stay as they are."""

    fresh: Count | None = Field(default=None, description="fresh examples taken from the data")
    minutes: Positive | None = Field(default=None, description="minutes of training")


class TrainSection(Interval):
    """How long to train, and how each update is made."""

    UNITS: ClassVar = ("examples", "epochs", "steps")

    share: None = Field(default=None, exclude=True, description="not here: the whole has no share")
    clip_norm: Positive | None = Field(
        default=None, description="clip the gradient's global norm to this; null: never"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="bf16, fp16: autocast in the forward and backward pass, with a loss scale for fp16; "
        "weights and their gradients stay fp32",
    )
    average: ExponentialAverage | StochasticAverage | None = Field(
        default=None, discriminator="kind", description="average of the weights, evaluated as well"
    )
    target: Target | None = Field(default=None, description="stop when a metric is reached")
    budget: Budget = Field(default=Budget(), description="stop early")
    guard: Guard = Field(default=Guard(), description="losses and gradients that are not finite")

"""The recipe: one frozen model per section, each key with its type, its default and one line of meaning.

Types and ranges live in the fields. What several keys say together lives in `CONTRADICTIONS`: functions whose
parameters are the sections that they read, so that each can be asked as soon as those sections are valid.
`trainer.door` reads a recipe; nothing here knows YAML.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from trainer.errors import Problem

Count = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Contradiction = tuple[str, str, str]  # key, what is wrong, what would be right


class Section(BaseModel):
    """What all sections share: unknown keys, wrong types, infinities and later changes are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        validate_by_name=True,
        serialize_by_alias=True,
    )


def refuse(wrong: str, right: str, key: str = "") -> PydanticCustomError:
    """An error of a section's validator, in the two halves of every message, at one of the section's keys."""
    return PydanticCustomError("refused", "{wrong}; {right}", {"wrong": wrong, "right": right, "key": key})


class Length(Section):
    """A length of training, in exactly one unit. An epoch serves as many examples as the data has."""

    UNITS: ClassVar = ("examples", "epochs", "steps", "share")

    examples: Natural | None = Field(None, description="examples served to the model, echoes included")
    epochs: Annotated[float, Field(ge=0)] | None = Field(None, description="times the training data's length")
    steps: Natural | None = Field(None, description="updates of the weights")
    share: Share | None = Field(None, description="share of the whole training, from 0 to 1")

    @property
    def unit(self) -> str:
        """The one unit that is given."""
        return next(unit for unit in self.UNITS if getattr(self, unit) is not None)

    def __str__(self) -> str:
        return f"{getattr(self, self.unit):g} {self.unit}"

    @model_validator(mode="after")
    def _one_unit(self) -> "Length":
        given = [unit for unit in self.UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise refuse(f"gives {' and '.join(given) or 'no unit'}", f"give one of {', '.join(self.UNITS)}")
        return self

    @model_serializer(mode="wrap")
    def _without_other_units(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            key: value for key, value in handler(self).items() if value is not None or key not in self.UNITS
        }


class Interval(Length):
    """A length that is not zero."""

    @model_validator(mode="after")
    def _not_zero(self) -> "Interval":
        if not getattr(self, self.unit):
            raise refuse(f"is 0 {self.unit}", "give more than 0")
        return self


class SavingInterval(Interval):
    """A length or a time: saving a checkpoint changes nothing, so a clock may decide when."""

    UNITS: ClassVar = (*Length.UNITS, "minutes")

    minutes: Positive | None = Field(None, description="minutes of wall time")


class TaskSection(Section):
    """The model, its data and its loss: the user's own code."""

    use: str = Field(
        description="`package.module:Class` of the task", pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
    )
    with_: dict[str, Any] = Field({}, alias="with", description="keyword arguments of the task's class")


class Init(Section):
    """Where the weights start. In this version: as the task's model makes them."""

    from_: None = Field(None, alias="from", description="start from these weights")


class Batch(Section):
    """The global batch, and the pieces that it is computed in on any number of workers."""

    size: Count = Field(description="examples per update of the weights, over all workers")
    micro: Count = Field(description="examples per micro-batch: the group of batch norm; divides `size`")
    lanes: Count = Field(
        48, description="streams that the data is dealt to; the most workers that can share them"
    )
    growth: None = Field(None, description="how the batch grows during training")
    bn_group: None = Field(None, description="examples per group of batch norm; null is the micro-batch")

    @model_validator(mode="after")
    def _divides(self) -> "Batch":
        if self.size % self.micro:
            below = self.size // self.micro * self.micro
            sizes = " and ".join(str(size) for size in (below, below + self.micro) if size)
            micro = min(
                (d for d in range(1, self.size + 1) if self.size % d == 0), key=lambda d: abs(d - self.micro)
            )
            right = f"the nearest sizes are {sizes}, the nearest micro is {micro}"
            raise refuse(f"is {self.size}, and micro {self.micro} does not divide it", right, "size")
        return self


class Optimizer(Section):
    """The update rule. Further keys are the rule's own hyperparameters, with their published defaults."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="a name of `optim.names()`")
    lr: Positive | None = Field(
        None, description="learning rate at `schedule.scale.base_batch`; null: the published one"
    )
    no_decay: Names | Literal["default"] | None = Field(
        "default",
        description="name patterns without weight decay; `default`: biases and normalisation; null: none",
    )
    no_adapt: Names | Literal["default"] | None = Field(
        "default",
        description="name patterns without trust ratio; `default`: biases and normalisation; null: none",
    )

    @property
    def hyper(self) -> dict[str, Any]:
        """Keyword arguments for `optim.build`, learning rate included."""
        extra = {key: tuple(v) if isinstance(v, list) else v for key, v in (self.model_extra or {}).items()}
        return ({} if self.lr is None else {"lr": self.lr}) | extra


class Scale(Section):
    """How the learning rate follows the batch: lr × (size / base_batch) ** power."""

    rule: Literal["none", "linear", "sqrt", "power"] = Field(
        "none", description="none: lr as it stands; linear: power 1; sqrt: power 1/2; power: the power below"
    )
    base_batch: Count | None = Field(None, description="the batch that `optimizer.lr` was chosen for")
    power: float | None = Field(None, description="exponent of rule `power`")

    @model_validator(mode="after")
    def _complete(self) -> "Scale":
        if self.rule != "none" and self.base_batch is None:
            raise refuse(
                f"rule {self.rule} has no base_batch", "give the batch that optimizer.lr was chosen for"
            )
        if (self.rule == "power") != (self.power is not None):
            raise refuse(
                f"rule is {self.rule} and power is {self.power}", "give power with rule power, and only there"
            )
        return self


class WarmUp(Length):
    """From `start` up to the full rate, over one length."""

    shape: Literal["constant", "linear", "polynomial", "exponential", "cosine"] = Field(
        "linear",
        description="the way up; constant: stay at `start`, then jump; exponential: by equal factors",
    )
    start: Share = Field(0.0, description="where it starts, as a share of the full rate")
    power: Positive = Field(1.0, description="exponent of shape polynomial")

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

    shape: Literal["constant"] = Field("constant", description="the rate stays")


class StepDecay(Section):
    """The rate is multiplied by `factor` at each milestone."""

    shape: Literal["step"] = Field(description="multiply at milestones")
    at: Annotated[tuple[Length, ...], Field(strict=False, min_length=1)] = Field(
        description="the milestones, counted from the start of training"
    )
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="what each milestone multiplies by")


class CosineDecay(Section):
    """Half a cosine from the end of warm-up to the end of training."""

    shape: Literal["cosine"] = Field(description="half a cosine")
    end: Share = Field(0.0, description="where it ends, as a share of the full rate")


class PolynomialDecay(Section):
    """(1 - progress) ** power from the end of warm-up to the end of training."""

    shape: Literal["polynomial"] = Field(description="(1 - progress) ** power")
    power: Positive = Field(1.0, description="1 is a straight line, 2 is usual with LARS")
    end: Share = Field(0.0, description="where it ends, as a share of the full rate")
    plus_one: bool = Field(
        False, description="MLPerf's form: progress reaches its end one step after the last"
    )


class ExponentialDecay(Section):
    """Stay for `hold` after warm-up, then multiply by `factor` once per `every`, smoothly."""

    shape: Literal["exponential"] = Field(description="by equal factors")
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(description="what each `every` multiplies by")
    every: Interval = Field(Interval(epochs=1), description="the length that multiplies by `factor` once")
    hold: Length = Field(Length(epochs=0), description="how long the full rate is kept after warm-up")
    end: Share = Field(0.0, description="the rate never falls below this share of the full rate")


Decay = Annotated[
    ConstantDecay | StepDecay | CosineDecay | PolynomialDecay | ExponentialDecay, Field(discriminator="shape")
]


class CoolDown(Length):
    """The last stretch of training, on top of any decay (with constant decay: warm-up-stable-decay)."""

    shape: Literal["linear", "sqrt"] = Field(
        "linear", description="linear: 1 - progress; sqrt: 1 - √progress"
    )
    end: Share = Field(0.0, description="where it ends, as a share of the rate that the decay gives")


class Schedule(Section):
    """The learning rate over the run, a function of the examples served."""

    scale: Scale = Field(Scale(), description="how the rate follows the batch")
    warmup: WarmUp | None = Field(None, description="the way up")
    decay: Decay = Field(ConstantDecay(), description="the way down")
    cooldown: CoolDown | None = Field(None, description="the last stretch, multiplied with the decay")


class Echo(Section):
    """Serve each prepared example more than once, so that slow preparation does not starve the workers."""

    factor: Annotated[float, Field(ge=1)] = Field(
        1.0, description="times each example is served, 1.5 as an exact mean"
    )
    at: Literal["before_augment"] = Field(
        "before_augment", description="the stage whose results are kept and repeated"
    )
    capacity: Count | None = Field(
        None, description="examples kept over all lanes; null: the smallest that shuffles"
    )


class Train(Interval):
    """How long to train, and how each update is made."""

    UNITS: ClassVar = ("examples", "epochs", "steps")

    share: None = Field(None, exclude=True, description="not here: the whole has no share")
    clip_norm: Positive | None = Field(
        None, description="clip the gradient's global norm to this; null: never"
    )
    precision: Literal["fp32"] = Field("fp32", description="number format of the forward and backward pass")
    average: None = Field(None, description="average of the weights over the run")
    target: None = Field(None, description="stop when a metric is reached")


class Eval(Section):
    """Validation during the run. The test split is used once, at its end."""

    every: Interval | None = Field(Interval(epochs=1), description="how often; null: only at the end")


class Checkpoint(Section):
    """What is kept to go on from."""

    every: SavingInterval = Field(SavingInterval(minutes=1), description="how often")
    keep: Count = Field(3, description="how many of the newest are kept")
    dir: str = Field("runs", description="folder that the runs' folders are made in", min_length=1)


class Pool(Section):
    """The processes that prepare examples."""

    min: Count = Field(1, description="processes at the start")
    max: Count = Field(2, description="the most that may be added")

    @model_validator(mode="after")
    def _ordered(self) -> "Pool":
        if self.max < self.min:
            raise refuse(f"is {self.max}, less than min {self.min}", f"give {self.min} or more", "max")
        return self


class Run(Section):
    """Where and how the run is computed. Nothing here changes what is computed."""

    workers: Count = Field(1, description="workers that share each batch")
    pool: Pool = Field(Pool(), description="the processes that prepare examples")
    parallel: Literal["ddp"] = Field(
        "ddp", description="how the model is spread: each worker holds the whole"
    )
    stack: Literal["auto"] | Count = Field("auto", description="micro-batches per forward pass")
    reduction: Literal["fast", "exact"] = Field(
        "fast", description="fast: fp32 sums; exact: bitwise the same on any number of workers"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU for each worker where there are any"
    )


class Track(Section):
    """Where the run is recorded."""

    uri: str | None = Field(None, description="MLflow tracking address; null: SQLite in the working folder")
    experiment: str = Field("default", description="MLflow experiment", min_length=1)


class Recipe(Section):
    """One run, whole. Everything that is not given has its default, written out in the resolved recipe."""

    name: str = Field(description="name of the run and of its folder", pattern=r"^[A-Za-z0-9][\w.-]*$")
    seed: Natural = Field(0, description="seed of weights, data order and random draws")
    task: TaskSection = Field(description="the model, its data and its loss")
    init: Init = Field(Init(), description="where the weights start")
    batch: Batch = Field(description="the global batch and its pieces")
    optimizer: Optimizer = Field(description="the update rule")
    schedule: Schedule = Field(Schedule(), description="the learning rate over the run")
    echo: Echo = Field(Echo(), description="serving examples more than once")
    train: Train = Field(description="how long, and how each update is made")
    eval: Eval = Field(Eval(), description="validation during the run")
    checkpoint: Checkpoint = Field(Checkpoint(), description="what is kept to go on from")
    run: Run = Field(Run(), description="where and how the run is computed")
    track: Track = Field(Track(), description="where the run is recorded")

    _places: dict[str, tuple[str, int | None]] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Equal when they say the same, wherever they were read from."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def problem(self, key: str, wrong: str, right: str) -> Problem:
        """A problem with a key that is found after reading, at the place that the key was read from."""
        nearest = key
        while nearest and nearest not in self._places:
            nearest = nearest.rpartition(".")[0]
        file, line = self._places.get(nearest, (None, None))
        return Problem(file, line, key, wrong, right)


def workers_without_work(batch: Batch, run: Run) -> Iterator[Contradiction]:
    """A worker owns whole lanes and computes whole micro-batches."""
    micro_batches = batch.size // batch.micro
    largest = min(micro_batches, batch.lanes)
    if run.workers > largest:
        yield (
            "run.workers",
            f"is {run.workers}, and a step has {micro_batches} micro-batches from {batch.lanes} lanes",
            f"the largest that works is {largest}",
        )


CONTRADICTIONS = (workers_without_work,)


def _sections(annotation: Any, loc: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[Section]]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield loc, annotation
        for name, field in annotation.model_fields.items():
            tagged = field.discriminator is not None
            for branch in get_args(field.annotation) if tagged else [field.annotation]:
                tag = (get_args(branch.model_fields["shape"].annotation)[0],) if tagged else ()
                yield from _sections(branch, (*loc, field.alias or name, *tag))
    else:
        for inner in get_args(annotation):
            yield from _sections(inner, loc)


SECTIONS: dict[tuple[str, ...], type[Section]] = dict(_sections(Recipe))
"""Every section by where it stands; one per shape, such as ("schedule", "decay", "cosine")."""

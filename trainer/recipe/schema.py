"""The recipe: one frozen model per section, each key with its type, its default and one line of meaning.

Types and ranges live in the fields. What several keys say together lives in `CONTRADICTIONS`: functions whose
parameters are the sections that they read, so that each can be asked as soon as those sections are valid.
`trainer.recipe.loader` reads a recipe; nothing here knows YAML.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import ConfigDict, Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from trainer.errors import Problem, RecipeError
from trainer.recipe.batch import BatchSection
from trainer.recipe.checkpoint import CheckpointSection
from trainer.recipe.durations import (
    Count,
    Few,
    Interval,
    Names,
    Natural,
    OnePath,
    Positive,
    Section,
    Seed,
    Text,
    refuse,
)
from trainer.recipe.parallel import FsdpSection, ModeOrSection, section_of
from trainer.recipe.schedule import ScheduleSection
from trainer.recipe.train import TrainSection

NUMBER_OR_RANGE = ("(number)", "(range)")  # what pydantic calls the two forms of a key; no part of its name
Contradiction = tuple[str, str, str]  # key, what is wrong, what would be right


class TaskSection(Section):
    """The model, its data and its loss: the user's own code."""

    use: str = Field(
        description="`package.module:Class` of the task",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        max_length=500,
    )
    with_: dict[str, Any] = Field(
        default={}, alias="with", description="keyword arguments of the task's class"
    )
    skip_bad: Natural = Field(
        default=0,
        description="examples that cannot be prepared and may be left out, the next good one standing in, "
        "before the run stops; 0: the first one stops it",
    )


class InitSection(Section):
    """Where the weights start."""

    from_: OnePath | None = Field(
        default=None,
        alias="from",
        description="weights to start from: a safetensors file, a checkpoint's folder, or a run "
        "(its folder, or its name in checkpoint.dir); null: as the task's model makes them",
    )
    zero: Names = Field(
        default=(),
        description="name patterns of parameters that start at zero: those of the last batch norm of each "
        "residual block let it start as the identity",
    )
    freeze: Names = Field(default=(), description="name patterns of parameters that stay as they start")

    @model_validator(mode="after")
    def _zero_counts(self) -> "InitSection":
        if self.zero and self.from_:
            right = "leave it out: all weights come from there"
            raise refuse(f"is {', '.join(self.zero)}, and from is {self.from_}", right, "zero")
        return self


class OptimizerSection(Section):
    """The update rule. Further keys are the rule's own hyperparameters, with their published defaults."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="a name of `optim.names()`")
    lr: Positive | None = Field(
        default=None, description="learning rate at `schedule.scale.base_batch`; null: the published one"
    )
    no_decay: Names | Literal["default"] | None = Field(
        default="default",
        description="name patterns without weight decay; `default`: biases and normalisation; null: none",
    )
    no_adapt: Names | Literal["default"] | None = Field(
        default="default",
        description="name patterns without trust ratio; `default`: biases and normalisation; null: none",
    )
    lr_multipliers: dict[str, Positive] = Field(
        default={},
        description="name patterns and what their learning rate is multiplied by; the first match counts",
    )

    @property
    def hyper(self) -> dict[str, Any]:
        """Keyword arguments for `optim.build`, learning rate included."""
        extra = {key: tuple(v) if isinstance(v, list) else v for key, v in (self.model_extra or {}).items()}
        return ({} if self.lr is None else {"lr": self.lr}) | extra


MOST_COPIES = 256  # of an example, in the mean


class EchoSection(Section):
    """Serve each prepared example more than once, so that slow preparation does not starve the workers."""

    factor: Annotated[float, Field(ge=1, le=MOST_COPIES)] | Literal["auto"] = Field(
        default=1.0,
        description="times each example is served, 1.5 as an exact mean; auto: what measured speeds ask for",
    )
    cap: Annotated[float, Field(ge=1, le=MOST_COPIES)] = Field(
        default=4.0, description="the largest factor that auto takes"
    )
    at: Literal["before_augment", "after_augment", "batch"] = Field(
        default="before_augment",
        description="what is repeated: prepared examples, augmented ones, or whole augmented micro-batches",
    )
    capacity: Natural | None = Field(
        default=None, description="examples kept over all lanes; null: the smallest that shuffles"
    )
    max_age: Count | None = Field(
        default=None,
        description="examples that the run serves between an example's first copy and its last, at most",
    )

    @property
    def largest(self) -> float:
        """The largest factor that the run may have."""
        return self.cap if self.factor == "auto" else self.factor


class EvalSection(Section):
    """Validation during the run. The test split is used once, at its end."""

    every: Interval | None = Field(default=Interval(epochs=1), description="how often; null: only at the end")
    micro: Count | None = Field(
        default=None, description="examples per forward pass of an evaluation; null: `batch.micro`"
    )


class PoolSection(Section):
    """The processes that prepare examples."""

    min: Few = Field(default=1, description="processes at the start")
    max: Few = Field(default=2, description="the most that may be added")

    @model_validator(mode="after")
    def _ordered(self) -> "PoolSection":
        if self.max < self.min:
            raise refuse(f"is {self.max}, less than min {self.min}", f"give {self.min} or more", "max")
        return self


class WorkersSection(Section):
    """A number of workers that follows what the cluster has room for."""

    min: Few = Field(default=1, description="fewest workers; without them the run waits")
    max: Few = Field(description="most workers at a time")

    @model_validator(mode="after")
    def _ordered(self) -> "WorkersSection":
        if self.max < self.min:
            raise refuse(f"is {self.max}, less than min {self.min}", f"give {self.min} or more", "max")
        return self


class RunSection(Section):
    """Where and how the run is computed. Nothing here changes what is computed, but for its rounding."""

    workers: Annotated[
        Annotated[Few, Tag(NUMBER_OR_RANGE[0])] | Annotated[WorkersSection, Tag(NUMBER_OR_RANGE[1])],
        Discriminator(lambda value: NUMBER_OR_RANGE[isinstance(value, dict | Section)]),
    ] = Field(
        default=1,
        description="workers that each batch is divided among; min and max: as many as there is room for, "
        "fewer when some are lost, more when there is room again",
    )
    pool: PoolSection = Field(default=PoolSection(), description="the processes that prepare examples")
    parallel: ModeOrSection = Field(
        default="ddp",
        description="ddp: each worker holds the whole model; fsdp: its rows of every layer; {ddp: {…}} or "
        "{fsdp: {…}} with options",
    )
    stack: Literal["auto"] | Count = Field(default="auto", description="micro-batches per forward pass")
    reduction: Literal["fast", "exact"] = Field(
        default="fast", description="fast: fp32 sums; exact: bitwise the same on any number of workers"
    )
    compile: bool = Field(
        default=False,
        description="compile the model for training, if the first micro-batch then has the same gradient; "
        "not with reduction exact: compiled code rounds in its own way on each machine",
    )
    recompute: bool | Names = Field(
        default=False,
        description="save memory: name patterns of the model's modules that compute their activations again "
        "in the backward pass; true: each block of its repeated ones",
    )
    channels_last: bool = Field(
        default=False,
        description="keep convolutions' weights and activations with their channels innermost in memory",
    )
    hung_after_s: Positive = Field(
        default=60.0,
        description="seconds without a sign of life, or ten steps where those take longer, after which the "
        "worker that holds the others up is replaced; thirty times as long outside of steps",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: a GPU for each worker where there are any"
    )

    @property
    def fewest_workers(self) -> int:
        """Without these the run waits."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most_workers(self) -> int:
        """The run takes no more."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def fsdp(self) -> FsdpSection | None:
        """How the model is spread over the workers; None where each holds the whole."""
        return section_of(self.parallel).fsdp

    @property
    def shards_state(self) -> bool:
        """Whether whole models share the optimizer's state among them."""
        ddp = section_of(self.parallel).ddp
        return ddp is not None and ddp.shard_state

    @model_validator(mode="after")
    def _spreads_what_it_can(self) -> "RunSection":
        right = "leave it out, or let parallel be ddp"
        for key, is_set in {"compile": self.compile, "channels_last": self.channels_last}.items():
            if self.fsdp is not None and is_set:
                raise refuse("is true, and parallel is fsdp", right, key)
        return self

    @model_validator(mode="after")
    def _compiles_no_exact_run(self) -> "RunSection":
        if self.compile and self.reduction == "exact":
            raise refuse(
                "is true, and reduction is exact", "leave it out, or let reduction be fast", "compile"
            )
        return self


class TrackSection(Section):
    """Where the run is recorded."""

    uri: OnePath | None = Field(
        default=None, description="MLflow tracking address; null: SQLite in the working folder; none: nowhere"
    )
    experiment: Text = Field(default="default", description="MLflow experiment", max_length=250)

    @field_validator("uri")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        try:
            urlsplit(value or "")
        except ValueError as error:
            raise refuse(f"is {value}, no address ({error})", "write it as http://host:5000") from error
        return value


class Recipe(Section):
    """One run, whole. Everything that is not given has its default, written out in the resolved recipe."""

    name: str = Field(
        description="name of the run and of its folder: letters, digits, `.`, `_`, `-`",
        pattern=r"^[A-Za-z0-9][\w.-]*$",
        max_length=60,
    )
    seed: Seed = Field(default=0, description="seed of weights, data order and random draws")
    task: TaskSection = Field(description="the model, its data and its loss")
    init: InitSection = Field(default=InitSection(), description="where the weights start")
    batch: BatchSection = Field(description="the global batch and its micro-batches")
    optimizer: OptimizerSection = Field(description="the update rule")
    schedule: ScheduleSection = Field(default=ScheduleSection(), description="the learning rate over the run")
    echo: EchoSection = Field(default=EchoSection(), description="serving examples more than once")
    train: TrainSection = Field(description="how long, and how each update is made")
    eval: EvalSection = Field(default=EvalSection(), description="validation during the run")
    checkpoint: CheckpointSection = Field(
        default=CheckpointSection(), description="what is kept to go on from"
    )
    run: RunSection = Field(default=RunSection(), description="where and how the run is computed")
    track: TrackSection = Field(default=TrackSection(), description="where the run is recorded")

    @model_validator(mode="after")
    def _with_capacity(self) -> "Recipe":
        if self.echo.capacity is not None:
            return self
        echo = self.echo.model_copy(update={"capacity": least_capacity(self.batch, self.echo)})
        return self.model_copy(update={"echo": echo})

    @property
    def evaluation_micro(self) -> int:
        """Examples per forward pass of an evaluation."""
        return self.eval.micro or self.batch.micro

    _places: dict[str, tuple[str, int | None]] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Equal when they say the same, wherever they were read from."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def flat(self) -> dict[str, str]:
        """Every key as `section.key` with its JSON value; texts as they are."""
        return flattened(self.model_dump(mode="json", by_alias=True))

    def remember(self, places: Mapping[str, tuple[str, int | None]]) -> None:
        """Keep where each key was read from, (file, line), for problems that are found later."""
        self._places.update(places)

    def placed(self, error: RecipeError) -> RecipeError:
        """The same problems, each at the place that its key was read from."""
        return RecipeError([self.problem(p.key, p.wrong, p.right) for p in error.problems])

    def problem(self, key: str, wrong: str, right: str) -> Problem:
        """A problem with a key that is found after reading, at the place that the key was read from."""
        known = key
        while known and known not in self._places:
            known = known.rpartition(".")[0]
        file, line = self._places.get(known, (None, None))
        return Problem(file, line, key, wrong, right)


def least_capacity(batch: BatchSection, echo: EchoSection) -> int:
    """The examples that the lanes must keep at least, for echoes to be shuffled."""
    return math.ceil(batch.lanes * batch.micro * (Fraction(str(echo.largest)) - 1))


def workers_without_work(batch: BatchSection, run: RunSection) -> Iterator[Contradiction]:
    """A worker owns whole lanes and computes whole micro-batches, in every stage of the batch."""
    if run.most_workers > batch.largest_workers:
        micro_batches = min(batch.sizes) // batch.micro
        wrong = (
            f"is {run.most_workers}, and a step has {micro_batches} micro-batches from {batch.lanes} lanes"
        )
        yield "run.workers", wrong, f"the largest that works is {batch.largest_workers}"


def echoes_without_room(batch: BatchSection, echo: EchoSection) -> Iterator[Contradiction]:
    """Every lane must keep the examples that wait for their next copy."""
    least = least_capacity(batch, echo)
    if echo.capacity is not None and echo.capacity < least:
        wrong = f"is {echo.capacity}, too small to shuffle the echoes of {batch.lanes} lanes of {batch.micro}"
        yield "echo.capacity", f"{wrong} at factor {echo.largest:g}", f"the smallest that works is {least}"


CONTRADICTIONS: tuple[Callable[..., Iterator[Contradiction]], ...] = (
    workers_without_work,
    echoes_without_room,
)


def sections(annotation: Any, loc: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[Section]]]:
    """Every section in a model by where it stands."""
    if not (isinstance(annotation, type) and issubclass(annotation, Section)):
        for inner in get_args(annotation):
            yield from sections(inner, loc)
        return
    shape = annotation.model_fields.get("shape") or annotation.model_fields.get("kind")
    shapes = get_args(shape.annotation) if shape else ()
    if len(shapes) == 1:  # one section of a union, which pydantic tells apart by its shape
        loc = (*loc, *shapes)
    yield loc, annotation
    for name, field in annotation.model_fields.items():
        yield from sections(field.annotation, (*loc, field.alias or name))


Sections = Mapping[tuple[str, ...], type[Section]]
SECTIONS: Sections = dict(sections(Recipe))
"""Every section by where it stands; one per shape, such as ("schedule", "decay", "cosine")."""


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested sections as `section.key` with JSON values; texts as they are."""
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= flattened(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return result

"""A sweep: which batches, optimizers and rates of one recipe are tried, and when a trial is over.

Names are the recipe's wherever the recipe has them. `cluster.experiments.plan` reads a sweep's file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.recipe.durations import Count, Few, OnePath, Positive, Section, Seed, refuse
from trainer.recipe.train import Target

MOST_SEEDS = 100


class EvaluateSection(Section):
    """When a trial is evaluated: after steps that grow by a factor."""

    growth: Annotated[float, Field(gt=1, le=2)] = Field(
        default=1.04, description="each evaluation comes after so many times the steps of the one before"
    )


class SweepTarget(Target):
    """The validation metric that every trial trains to."""

    evaluate: EvaluateSection = Field(default=EvaluateSection(), description="when the metric is measured")


class RateSection(Section):
    """How the best learning rate of each cell is found."""

    search: Literal["bracket", "grid", "optuna"] = Field(
        default="bracket",
        description="bracket: octaves around the neighbours' best, then a parabola; grid: `values`; optuna: "
        "`trials` of its TPE sampler",
    )
    start: Literal["auto"] | Positive = Field(
        default="auto", description="peak rate to begin with; auto: the arm's own at the recipe's batch"
    )
    tolerance: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.05, description="rates whose steps differ by less are equal: the lower one is taken"
    )
    values: Annotated[tuple[Positive, ...], Field(strict=False, max_length=1000)] = Field(
        default=(), description="the rates of search grid"
    )
    trials: Annotated[int, Field(ge=3, le=1000)] = Field(
        default=10, description="the most rates that search bracket or optuna tries in a cell"
    )

    @model_validator(mode="after")
    def _grid_has_values(self) -> RateSection:
        if (self.search == "grid") != bool(self.values):
            wrong = f"search is {self.search}, and there are {len(self.values)} values"
            raise refuse(wrong, "give values with search grid, and only there", "values")
        return self


class SeedsSection(Section):
    """The seeds of trials: of weights, data order and draws."""

    search: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1, max_length=MOST_SEEDS)] = Field(
        default=(101, 102), description="seeds of the search; the first alone, then all where it counts"
    )
    report: Annotated[int, Field(ge=0, le=MOST_SEEDS)] = Field(
        default=5, description="fresh seeds with which the best rate is repeated: 0, 1, ..."
    )

    @model_validator(mode="after")
    def _fresh(self) -> SeedsSection:
        if len(set(self.search)) < len(self.search):
            raise refuse("has a seed twice", "give each once", "search")
        if used := [seed for seed in self.search if seed < self.report]:
            wrong = f"has seed {used[0]}, and the report's are 0 to {self.report - 1}"
            raise refuse(wrong, f"give seeds from {self.report} on", "search")
        return self


class SweepBudget(Section):
    """What ends the search before it is done."""

    examples: Annotated[float, Field(gt=0, le=1e15)] | None = Field(
        default=None, description="examples that all trials together may serve, in equal parts per arm"
    )


class StopSection(Section):
    """When a trial is given up, and when the search is."""

    after_best: Annotated[float, Field(ge=1, le=100)] = Field(
        default=1.3, description="a trial is stopped after so many times the steps of its cell's best one"
    )
    budget: SweepBudget = Field(default=SweepBudget(), description="what the search may use")


class SweepRun(Section):
    """How trials are computed; nothing here changes what is proposed."""

    groups: Few = Field(
        default=1, description="worker groups that train trials side by side, each `run.workers` wide"
    )


class Sweep(Section):
    """A scaling experiment: one recipe at many batches, with the rate searched for at each."""

    name: str = Field(
        description="name of the sweep and of its folder: letters, digits, `.`, `_`, `-`",
        pattern=r"^[A-Za-z0-9][\w.-]*$",
        max_length=60,
    )
    recipe: OnePath | dict[str, Any] = Field(
        description="the recipe's file, seen from the sweep's, or the recipe itself"
    )
    target: SweepTarget = Field(description="what a trial trains to")
    batches: Annotated[tuple[Count, ...], Field(strict=False, min_length=1, max_length=100)] = Field(
        description="global batches, rising"
    )
    arms: Annotated[dict[str, dict[str, Any]], Field(max_length=100)] = Field(
        default={}, description="names, and the recipe's sections that each changes; default: the recipe"
    )
    rate: RateSection = Field(default=RateSection(), description="how the best rate is found")
    also: dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = Field(
        default={}, description="further keys of the recipe with the values to try, as more axes"
    )
    carry: dict[str, str] = Field(
        default={}, description="what follows the batch from the recipe's own, by rule; the rest stays"
    )
    seeds: SeedsSection = Field(default=SeedsSection(), description="the seeds of trials")
    stop: StopSection = Field(default=StopSection(), description="when a trial or the search is given up")
    run: SweepRun = Field(default=SweepRun(), description="how trials are computed")

    @field_validator("batches")
    @classmethod
    def _rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise refuse(f"is {', '.join(map(str, value))}", "let each be larger than the one before")
        return value

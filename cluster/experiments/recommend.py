"""`lockstep recommend`: the recipe for another batch, with what it is expected to need.

Batch, rate, betas, decay, warm-up, length and echoes go together: the rate comes from the law of best rates,
the steps from the law of steps, and the rest is carried from batch to batch by the sweep's own rules.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from cluster.experiments.curve import Curve, curves, prior_of
from cluster.experiments.forecast import LEVEL, Forecaster, Prediction, Prior, probe
from cluster.experiments.laws import StepTime
from cluster.experiments.plan import put
from cluster.experiments.promises import FORECAST, Promise
from cluster.experiments.references import mlperf
from cluster.experiments.trials import Cell, Study
from trainer.errors import UserError
from trainer.plan.carry import Change, carried
from trainer.recipe import loader
from trainer.recipe.messages import nearest
from trainer.run_folder import journal, layout

FAR = 4  # times the largest batch tried: beyond, another trial is proposed first
LENGTH = 2  # times the interval's upper end, where the length is free: the target ends the run before
EVALUATIONS = 25  # up to the expected end
_LINE = 108  # characters of a comment
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Wish:
    """What the user asked for. Deadline in seconds, budget in examples."""

    batch: int | None = None
    workers: int | None = None
    deadline: float | None = None
    budget: float | None = None
    arm: str | None = None
    prior: str | None = None

    @classmethod
    def of(cls, deadline: str | None = None, prior: str | None = None, **others: Any) -> Wish:
        """From the command line. UserError where a value is none, or neither batch nor workers are given."""
        if others.get("batch") is None and others.get("workers") is None:
            raise UserError("recommend: for what is missing; give --batch B or --workers N")
        if prior is not None and prior not in mlperf():
            raise UserError(f"--prior {prior}: is no table; {nearest(prior, mlperf())}")
        if deadline is None:
            return cls(prior=prior, **others)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", deadline)
        if match is None or not float(match[1]):
            raise UserError(f"--deadline {deadline}: is no time; write it as 90s, 45m, 12h or 3d")
        return cls(deadline=float(match[1]) * _SECONDS[match[2]], prior=prior, **others)


@dataclass(frozen=True)
class Candidate:
    """One curve of the sweep at one batch, forecast."""

    curve: Curve
    batch: int
    forecaster: Forecaster
    step_seconds: float
    steps: Prediction
    seconds: Prediction

    @property
    def examples(self) -> Prediction:
        """Served up to the target."""
        return self.steps.times(self.batch)

    def meets(self, wish: Wish) -> bool:
        """Whether the upper ends of the intervals keep within what was asked for."""
        return (wish.deadline is None or self.seconds.high <= wish.deadline) and (
            wish.budget is None or self.examples.high <= wish.budget
        )


def advice(sweep: str, directory: str, **wish: Any) -> str:
    """What `lockstep recommend` prints for a sweep, by name or folder, and a wish from the command line."""
    wanted = Wish.of(**wish)
    return recommend(Study.read(layout.named(directory, sweep)), wanted)


def recommend(study: Study, wish: Wish) -> str:
    """The recipe as YAML with its reasons; its forecast is noted in the sweep's journal. UserError where the
    sweep or the wish allows none.
    """
    chosen, others = choose(study, wish)
    rate, why_rate = _rate(chosen)
    values, changes = _values(study, chosen, rate, wish)
    steps = chosen.steps
    identity = json.dumps([values, steps.low, steps.high], sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:8]
    values["name"] = f"{values['name'][:40]}-{chosen.batch}-{name}"
    recipe = loader.of_values(values, f"the recipe recommended from {study.name}")
    cell = Cell(chosen.curve.arm, chosen.batch, chosen.curve.axes)
    promise = Promise(name, recipe.name, cell, rate, steps, chosen.seconds)
    journal.append(study.folder, FORECAST, **promise.fields())
    reasons = [*_expected(study, chosen, others, wish, name), why_rate, *_carried(changes, study)]
    reasons += [
        *_proposal(study, chosen, wish),
        f"`lockstep report {study.folder.name}` grades it when it has run.",
    ]
    return "\n".join([*map(_comment, reasons), loader.dump(recipe).rstrip()])


def choose(study: Study, wish: Wish) -> tuple[Candidate, list[Candidate]]:
    """The candidate with the fewest steps, and the others at its batch. Of those that keep a deadline, the
    one with the fewest examples.
    """
    every = curves(study)
    found = [curve for curve in every if len(curve.usable) > 1]
    if wish.arm is not None:
        found = [curve for curve in found if wish.arm in (curve.name, curve.arm)]
    if not found:
        wrong = f"has no arm {wish.arm} with two batches" if wish.arm else "has no arm with two batches"
        known = ", ".join(study.arms)
        raise UserError(f"{study.name}: {wrong} that reached the target; its arms are {known}")
    batches = [wish.batch] if wish.batch else _batches(study, wish)
    candidates = [c for curve in found for c in _candidates(study, curve, every, batches, wish)]
    if wish.batch is None:
        candidates = _within(candidates, wish)
    is_cheapest = wish.batch is None and wish.deadline is not None
    best = min(candidates, key=lambda c: (c.examples if is_cheapest else c.steps).median)
    return best, [c for c in candidates if c.batch == best.batch and c.curve is not best.curve]


def _batches(study: Study, wish: Wish) -> list[int]:
    """Those that give each worker as many whole micro-batches, up to four times what was tried."""
    micro = max(recipe["batch"]["micro"] for recipe in study.told["recipes"].values())
    least, largest = (wish.workers or 1) * micro, FAR * max(study.batches)
    if least > largest:
        wrong = (
            f"--workers {wish.workers}: with micro-batches of {micro} they need a batch of {least:,} or more"
        )
        right = f"the sweep reached {max(study.batches):,}; give fewer workers, or sweep larger batches"
        raise UserError(f"{wrong}, and {right}")
    return [least * 2**octave for octave in range(int(math.log2(largest / least)) + 1)]


def _within(candidates: list[Candidate], wish: Wish) -> list[Candidate]:
    """Those that keep to deadline and budget; without either, those of at most twice the fewest examples."""
    if wish.deadline is None and wish.budget is None:
        fewest = min(c.examples.median for c in candidates)
        return [c for c in candidates if c.examples.median <= 2 * fewest]
    kept = [c for c in candidates if c.meets(wish)]
    if not kept:
        fast = min(candidates, key=lambda c: c.seconds.high)
        cheap = min(candidates, key=lambda c: c.examples.high)
        raise UserError(
            f"no batch keeps within what was asked for with a chance of {0.5 + LEVEL / 2:.0%}; "
            f"the fastest is {fast.batch:,} with {_time(fast.seconds.high)}, "
            f"the cheapest {cheap.batch:,} with {cheap.examples.high:,.0f} examples"
        )
    return kept


def _candidates(
    study: Study, curve: Curve, every: Sequence[Curve], batches: Sequence[int], wish: Wish
) -> Iterator[Candidate]:
    prior = prior_of(curve, every)
    if wish.prior is not None:
        prior = Prior.of([mlperf()[wish.prior].b_crit])
    forecaster = curve.forecaster(prior)
    workers = study.told["recipes"][curve.arm]["run"]["workers"]
    timed = [t for t in study.trials if (t.cell.arm, t.cell.axes) == (curve.arm, curve.axes) and t.seconds]
    time = StepTime.fit([t.cell.batch / workers for t in timed], [t.seconds / t.trained_steps for t in timed])
    for batch in batches:
        steps = forecaster.predict(batch)
        step = time.seconds(batch / (wish.workers or workers))
        yield Candidate(curve, batch, forecaster, step, steps, steps.times(step, time.scatter))


def _rate(chosen: Candidate) -> tuple[float, str]:
    """The rate and the reason: that of the sweep, its rule's between the batches tried, and beyond them the
    saturating rule with the critical batch of the steps.
    """
    curve, batch = chosen.curve, chosen.batch
    known = {point.batch: point.rate for point in curve.usable}
    if rate := known.get(batch):
        return rate, f"rate {rate:.4g}: the best found at this batch"
    if batch > max(known):
        law = curve.rates_beyond(chosen.forecaster)
        why = f"beyond the batches tried, {law.rule.formula} with the critical batch of the steps"
    else:
        law = next(iter(curve.rate_laws.values()))
        why = f"{law.rule.formula}, the rule that fits the best rates best"
    rate = float(f"{law.rates([batch])[0]:.4g}")
    low, high = (float(end[0]) for end in law.band([batch], LEVEL))
    interval = f" ({LEVEL:.0%}: {low:.3g} to {high:.3g})" if math.isfinite(low) else ""
    return rate, f"rate {rate:.4g}{interval}: {why}"


def _values(study: Study, chosen: Candidate, rate: float, wish: Wish) -> tuple[dict[str, Any], list[Change]]:
    """The recipe's values at the batch, and what the sweep's rules changed."""
    values = _base(study, chosen.curve)
    if wish.workers:
        values["run"]["workers"] = wish.workers
    values, changes = carried(values, chosen.batch, study.told.get("carry") or {})
    values["optimizer"]["lr"] = rate
    values["schedule"]["scale"] = {"rule": "none"}
    target = {
        "metric": study.target.metric,
        "at_most": study.target.at_most,
        "at_least": study.target.at_least,
    }
    values["train"]["target"] = {key: value for key, value in target.items() if value is not None}
    values["eval"]["every"] = {"steps": max(1, round(chosen.steps.median / EVALUATIONS))}
    if values["schedule"]["decay"]["shape"] == "constant" and not values["schedule"].get("cooldown"):
        for unit in ("examples", "epochs", "steps"):
            values["train"].pop(unit, None)
        values["train"]["steps"] = math.ceil(LENGTH * chosen.steps.high)
    if "echo.factor" in dict(chosen.curve.axes):
        values["echo"]["capacity"] = None
    return values, changes


def _base(study: Study, curve: Curve) -> dict[str, Any]:
    """The values of an arm's recipe at one value of each axis."""
    values = deepcopy(study.told["recipes"][curve.arm])
    for key, value in curve.axes:
        put(values, key, value)
    return values


def _expected(
    study: Study, chosen: Candidate, others: Sequence[Candidate], wish: Wish, name: str
) -> Iterator[str]:
    yield f"Recommended from {study.folder.name}; forecast {name}"
    beside = ", ".join(f"{c.curve.name} {c.steps.median:,.0f}" for c in others)
    yield f"{chosen.curve.name} at batch {chosen.batch:,}" + (
        f" (steps of the others: {beside})" if beside else ""
    )
    metric = study.target
    bound = f"at most {metric.at_most:g}" if metric.at_most is not None else f"at least {metric.at_least:g}"
    yield f"until validation {metric.metric} is {bound}, with intervals of {LEVEL:.0%}:"
    yield f"  steps     {_interval(chosen.steps)}"
    yield f"  examples  {_interval(chosen.examples)}"
    low, middle, high = (_time(t) for t in (chosen.seconds.low, chosen.seconds.median, chosen.seconds.high))
    yield f"  time      {middle} ({low} to {high}), {1000 * chosen.step_seconds:,.3g} ms a step"
    if wish.deadline is not None:
        chance = chosen.forecaster.chance(chosen.batch, wish.deadline / chosen.step_seconds)
        yield f"  within {_time(wish.deadline)} with a chance of {chance:.0%}"
    if wish.budget is not None:
        chance = chosen.forecaster.chance(chosen.batch, wish.budget / chosen.batch)
        yield f"  within {wish.budget:,.0f} examples with a chance of {chance:.0%}"


def _carried(changes: Sequence[Change], study: Study) -> Iterator[str]:
    yield from map(str, changes)
    rules = study.told.get("carry") or {}
    if not rules:
        yield "betas, weight decay and warm-up stay as they are: the sweep has no rules for them"


def _proposal(study: Study, chosen: Candidate, wish: Wish) -> Iterator[str]:
    largest = max(point.batch for point in chosen.curve.usable)
    if chosen.batch <= FAR * largest:
        return
    found = probe(*chosen.curve.measured, chosen.batch, prior_of(chosen.curve, curves(study)))
    octaves = math.log2(chosen.batch / largest)
    yield (
        f"First try batch {found.batch:,}: {chosen.batch:,} lies {octaves:.1f} octaves beyond the largest "
        "batch tried. One trial there is expected to narrow the interval of steps from "
        f"x{found.width_before:.2g} to x{found.width_after:.2g}"
    )


def _comment(reason: str) -> str:
    indent = "  " if reason.startswith("  ") else ""
    return "\n".join(textwrap.wrap(reason, _LINE, initial_indent=f"# {indent}", subsequent_indent="#   "))


def _interval(prediction: Prediction) -> str:
    return f"{prediction.median:,.0f} ({prediction.low:,.0f} to {prediction.high:,.0f})"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

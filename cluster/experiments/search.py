"""Which trials come next: one generator for each strand (an arm at one value of the further axes), a pure
function of the rounds that it was sent. So a search that was cut off goes on from its journal, and neither
clocks nor the number of groups change what it proposes.

A strand begins at the batch nearest to the recipe's, goes up, then down. In each cell a bracket of octaves is
laid around the rate that the neighbours forecast and moved until its middle is best, which is then tried on
the other search seeds; the bracket's parabola has the cell's rate. Over all cells one surface is fitted
(`bowl.surface`), and the rate that is reported lies halfway between the two. It is repeated on fresh seeds.
`benchmarks/search.py` measures how good that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

from cluster.experiments import bowl
from cluster.experiments.bowl import Bowl
from cluster.experiments.tpe import RateSampler
from cluster.experiments.trials import Ask, Axes, Cell, Stage, Trial
from trainer.recipe.sweep import Sweep

OUTWARD = (-4.0, -2.0, 0.0, 2.0, 4.0)  # octaves from where a strand begins
REACH = 3.0  # octaves to each side of the forecast in which Optuna searches
REPORT_PATIENCE = 3.0  # times the best steps: a reported trial is given up later than one of the search
LOWERINGS = 3  # thirds of an octave that a reported rate is lowered at most
SHARES = (8, 4, 2, 1)  # of the recipe's length that a strand's first trials are given


@dataclass(frozen=True)
class Best:
    """The rate that a search has chosen for a cell; None where no rate reached the target."""

    cell: Cell
    rate: float | None


Strand = Generator[list[Ask] | Best, list[Trial], None]


@dataclass
class _Search:
    """What a strand has found so far."""

    sweep: Sweep
    arm: str
    axes: Axes
    budget: float  # examples
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.bowls: dict[int, Bowl] = {}
        self.best: dict[int, float] = {}  # octaves, of the cells that are done
        self.sign = 1 if self.sweep.target.at_least is None else -1

    def round(
        self, batch: int, xs: Iterable[float], seeds: Iterable[int], limit: float, stage: Stage = "search"
    ) -> Generator[list[Ask], list[Trial], list[Trial]]:
        """Try rates on seeds; the bowl of the batch has the trials afterwards."""
        cell, seeds = Cell(self.arm, batch, self.axes), list(seeds)
        asks = [Ask(cell, 2.0**x, seed, stage, math.ceil(limit)) for x in xs for seed in seeds]
        if not asks or self.is_spent:
            return []
        trials = yield asks
        for trial in trials:
            self.spent += trial.examples
            if stage == "search":
                self.bowls.setdefault(batch, Bowl(self.sign)).add(trial)
        return trials

    @property
    def is_spent(self) -> bool:
        """Whether the budget is."""
        return self.spent >= self.budget

    def limit(self, batch: int) -> float:
        """Steps after which a batch's trials are given up before any of them has reached the target: no batch
        needs more steps than a smaller one, nor more examples than a larger one.
        """
        near = min(self.best, key=lambda known: abs(math.log2(known / batch)))
        return self.sweep.stop.after_best * self.bowls[near].steps * max(1.0, near / batch)


def strand(
    sweep: Sweep, arm: str, axes: Axes, start: tuple[int, float], length: Callable[[int], int]
) -> Strand:
    """Search one strand.

    Args:
        start: the batch and the peak rate of the arm's own recipe.
        length: the steps of the recipe at a batch.
    """
    strands = max(1, len(sweep.arms)) * math.prod(map(len, sweep.also.values()))
    search = _Search(sweep, arm, axes, (sweep.stop.budget.examples or math.inf) / strands)
    if sweep.rate.search == "grid":
        yield from _grid(search, length)
        return
    own_batch, own_rate = start
    first = min(sweep.batches, key=lambda batch: abs(math.log2(batch / own_batch)))
    upward = [batch for batch in sweep.batches if batch > first]
    downward = [batch for batch in reversed(sweep.batches) if batch < first]
    if sweep.rate.search == "optuna":
        yield from _tpe(search, bowl.octaves(own_rate), [first, *upward, *downward], length)
        return
    for batch in [first, *upward, *downward]:
        if not search.best:
            yield from _outward(search, batch, bowl.octaves(own_rate), length(batch))
        else:
            x = bowl.forecast(search.best, batch)
            yield from search.round(batch, [x], sweep.seeds.search[:1], search.limit(batch))
        yield from _bracket(search, batch, length(batch))
    yield from _report(search, _halfway(search), length)


def _tpe(search: _Search, x: float, batches: Sequence[int], length: Callable[[int], int]) -> Strand:
    """As many rates as allowed in each cell, one after another as Optuna proposes them; the best one again on
    the other seeds.
    """
    sweep = search.sweep
    for batch in batches:
        x = bowl.forecast(search.best, batch) if search.best else x
        sampler = RateSampler(x, REACH, f"{sweep.name} {Cell(search.arm, batch, search.axes)}")
        for _ in range(sweep.rate.trials):
            tried = sampler.ask()
            here = search.bowls.get(batch)
            limit = sweep.stop.after_best * here.steps if here and here.reached else length(batch)
            yield from search.round(batch, [tried], sweep.seeds.search[:1], min(limit, length(batch)))
            if search.is_spent:
                break
            sampler.tell(search.bowls[batch].means()[bowl.octaves(2.0**tried)])
        if batch in search.bowls and (here := search.bowls[batch]).reached:
            best = here.best(sweep.rate.tolerance)
            yield from search.round(batch, [best], sweep.seeds.search[1:], sweep.stop.after_best * here.steps)
            search.best[batch] = here.best(sweep.rate.tolerance)
    yield from _report(search, search.best, length)


def _grid(search: _Search, length: Callable[[int], int]) -> Strand:
    """Every rate on every seed of the search; the best one by its parabola."""
    sweep = search.sweep
    xs = [bowl.octaves(rate) for rate in sorted(sweep.rate.values)]
    for batch in sweep.batches:
        yield from search.round(batch, xs, sweep.seeds.search, length(batch))
        if batch in search.bowls and search.bowls[batch].reached:
            search.best[batch] = search.bowls[batch].lowest(sweep.rate.tolerance)
    yield from _report(search, search.best, length)


def _outward(search: _Search, batch: int, x: float, total: int) -> Generator[list[Ask], list[Trial], None]:
    """The first rates of a strand: far apart, and given more steps until one of them reaches the target."""
    xs = [x + away for away in OUTWARD]
    for share in SHARES:
        yield from search.round(batch, xs, search.sweep.seeds.search[:1], math.ceil(total / share))
        here = search.bowls.get(batch)
        if here is None or here.reached:
            return
        xs = [tried for tried, trials in here.trials.items() if trials[0].end != "diverged"]


def _bracket(search: _Search, batch: int, total: int) -> Generator[list[Ask], list[Trial], None]:
    """Move the bracket until its middle is best, and try that on the other seeds."""
    sweep, here = search.sweep, search.bowls.get(batch)
    if here is None:  # the budget was spent before
        return
    tolerance, patience, first = sweep.rate.tolerance, sweep.stop.after_best, sweep.seeds.search[:1]
    while len(here.trials) < sweep.rate.trials and not search.is_spent:
        best, width = here.best(tolerance), 1 if here.reached else 2
        limit = patience * here.steps if here.reached else here.longest
        xs = [x for x in (best - width, best + width) if not here.has(x)]
        if not xs and not here.reached and here.longest < total:
            xs, limit = here.near(best), 2 * here.longest
        if not xs:
            break
        yield from search.round(batch, xs, first, min(total, limit))
    if here.reached:
        best = here.best(tolerance)
        yield from search.round(batch, [best], sweep.seeds.search[1:], patience * here.steps)
        search.best[batch] = here.lowest(tolerance)


def _halfway(search: _Search) -> dict[int, float]:
    """Between each cell's own best and that of the surface over all; with few cells, each cell's own."""
    if len(search.best) < 3:
        return search.best
    together = bowl.surface({batch: search.bowls[batch] for batch in search.best})
    return {batch: (x + together[batch]) / 2 for batch, x in search.best.items()}


def _report(search: _Search, best: dict[int, float], length: Callable[[int], int]) -> Strand:
    """Say each cell's rate, and repeat it on fresh seeds. Where one of them fails, the rate lies at a cliff,
    and a lower one is repeated instead.
    """
    seeds = range(search.sweep.seeds.report)
    for batch in search.sweep.batches:
        cell = Cell(search.arm, batch, search.axes)
        if batch not in best:
            yield Best(cell, None)
            continue
        limit = min(length(batch), REPORT_PATIENCE * search.bowls[batch].steps)
        for lowering in range(LOWERINGS + 1):
            x = best[batch] - lowering / 3
            yield Best(cell, 2.0**x)
            trials = yield from search.round(batch, [x], seeds, limit, "report")
            if all(trial.steps for trial in trials):
                break

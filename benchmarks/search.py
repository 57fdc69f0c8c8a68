"""How good are the rates that a sweep's search finds, beside other searches with as many trials, and what
does it cost beside an exhaustive grid?

Replayed on measured curves: a sweep that tried many rates on several seeds gives, for each cell, a curve of
ln steps against the rate and the noise between seeds. Regret is the steps at the rate that a search chooses
over those at the best rate of the curve, less 1.

    python benchmarks/search.py [SWEEP] [--replays 200] [--check]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from forecast import study
from trials import Bar, check_bars

from cluster.experiments.search import Best, strand
from cluster.experiments.trials import Ask, Cell, End, Study, Trial
from trainer.recipe.sweep import Sweep

DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "digits_sweep.jsonl.gz"
TOO_HIGH = 0.33  # octaves above the highest rate that reached the target; most run on there until given up
WITHIN = 1.2  # ln steps above the best up to which a curve is fitted
OURS = "sweep's own"


class MeasuredCurve:
    """ln steps against the rate in octaves, of one cell."""

    def __init__(self, study: Study, cell: Cell) -> None:
        by_rate: dict[float, list[float]] = {}
        for trial in study.at(cell):
            by_rate.setdefault(round(math.log2(trial.rate), 3), []).append(
                math.log(trial.steps) if trial.steps else math.inf
            )
        reached = {x: values for x, values in by_rate.items() if all(map(math.isfinite, values))}
        x = np.array(sorted(reached))
        y = np.array([np.mean(reached[each]) for each in x])
        near = y < y.min() + WITHIN
        self.middle, self.low, self.high = x[y.argmin()], x[near].min(), x[near].max()
        weights = np.sqrt([len(reached[each]) for each in x[near]])
        self._fit = np.polyfit(x[near] - self.middle, y[near], 4 if near.sum() > 6 else 2, w=weights)
        grid = np.linspace(self.low, self.high, 400)
        heights = np.array([self.at(each) for each in grid])
        self.best, self.least = float(grid[heights.argmin()]), float(heights.min())
        spreads = [np.var(values, ddof=1) for values in reached.values() if len(values) > 2]
        self.noise = math.sqrt(float(np.mean(spreads)))

    def at(self, x: float) -> float:
        """Expected ln steps; below the rates that were measured, steps grow as the rate falls."""
        if x > self.high + TOO_HIGH:
            return math.inf
        inside = min(max(x, self.low), self.high)
        return float(np.polyval(self._fit, inside - self.middle)) + max(0.0, self.low - x) * math.log(2)

    def regret(self, x: float) -> float:
        """Of a rate; one that diverges costs as much as anything that is measured."""
        return math.exp(min(self.at(x), self.least + 2) - self.least) - 1


@dataclass
class Replay:
    """Trials of one search on measured curves; examples are counted."""

    curves: dict[int, MeasuredCurve]
    random: np.random.Generator
    examples: float = 0.0
    trials: int = 0

    def train(self, ask: Ask) -> Trial:
        """What a trial would have brought."""
        batch, x = ask.cell.batch, math.log2(ask.rate)
        curve = self.curves[batch]
        steps = math.exp(curve.at(x) + self.random.normal(0, curve.noise))
        end: End = "reached" if steps <= ask.limit else "stopped"
        taken = min(ask.limit, math.ceil(min(steps, 1e12)))
        self.examples += taken * batch
        self.trials += 1
        away = ((taken, min(steps, 1e12) / taken),)  # the further from the target the larger
        return ask.brought(end, taken, steps if end == "reached" else None, key="", seconds=0.0, curve=away)


Chosen = dict[int, float]  # the rate, in octaves, by batch


def ours(replay: Replay, start: tuple[int, float], length: Callable[[int], int]) -> Chosen:
    """The sweep's own search over all batches of an optimizer."""
    sweep = Sweep.model_validate(
        {
            "name": "replay",
            "recipe": {},
            "target": {"metric": "loss", "at_most": 0.2},
            "batches": sorted(replay.curves),
            "seeds": {"report": 0},
        }
    )
    chosen: Chosen = {}
    search, answer = strand(sweep, "arm", (), start, length), None
    try:
        while True:
            item = search.send(answer)  # type: ignore[arg-type]
            answer = None if isinstance(item, Best) else [replay.train(ask) for ask in item]
            if isinstance(item, Best) and item.rate:
                chosen[item.cell.batch] = math.log2(item.rate)
    except StopIteration:
        return chosen


Proposer = Generator[float, float, None]  # yields rates, and is sent what each has brought


def one_by_one(
    replay: Replay, trials: int, length: Callable[[int], int], proposals: Callable[[float, int], Proposer]
) -> Chosen:
    """The best single rate of those that are proposed in the six octaves around each cell's best, off by up
    to one; given up as ours are.
    """
    chosen: Chosen = {}
    for batch, curve in replay.curves.items():
        proposer = proposals(curve.best + replay.random.uniform(-1, 1), int(replay.random.integers(2**31)))
        best, at, limit = math.inf, curve.best, length(batch)
        x = next(proposer)
        for number in range(trials):
            trial = replay.train(Ask(Cell("arm", batch), 2.0**x, 0, "search", limit))
            value = math.log(trial.steps) if trial.steps else math.inf
            if value < best:
                best, at, limit = value, x, math.ceil(1.3 * math.exp(value))
            if number + 1 < trials:
                x = proposer.send(min(value, 20.0))
        chosen[batch] = at
    return chosen


def at_random(middle: float, seed: int) -> Proposer:
    """Independent rates."""
    random = np.random.default_rng(seed)
    while True:
        yield float(random.uniform(middle - 3, middle + 3))


def tpe(middle: float, seed: int) -> Proposer:
    """Optuna's default sampler."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    while True:
        trial = study.ask()
        value = yield trial.suggest_float("x", middle - 3, middle + 3)
        study.tell(trial, value)


def exhaustive(replay: Replay, length: Callable[[int], int]) -> Chosen:
    """Every third of an octave over six octaves, in any order, on five seeds each; given up at three times
    the best so far.
    """
    chosen: Chosen = {}
    for batch, curve in replay.curves.items():
        found: dict[float, float] = {}
        limit = length(batch)
        rates = curve.best + replay.random.uniform(-1 / 6, 1 / 6) + np.arange(-9, 10) / 3
        for x in replay.random.permutation(rates):
            asks = [Ask(Cell("arm", batch), 2.0**x, seed, "search", limit) for seed in range(5)]
            steps = [replay.train(ask).steps for ask in asks]
            if all(steps):
                found[float(x)] = float(np.mean(np.log(np.array(steps, float))))
                limit = min(limit, math.ceil(3 * math.exp(found[float(x)])))
        chosen[batch] = min(found, key=lambda x: found[x])
    return chosen


def replays(study: Study, number: int) -> dict[str, np.ndarray]:
    """Of each search: regret, examples beside the exhaustive grid's, trials per cell; [cells, 3]."""
    curves = {arm: {b: MeasuredCurve(study, Cell(arm, b)) for b in study.batches} for arm in study.arms}
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(number):
        arm = study.arms[seed % len(study.arms)]
        random = np.random.default_rng([1, seed])

        def length(batch: int, of: dict[int, MeasuredCurve] = curves[arm]) -> int:
            return math.ceil(8 * math.exp(of[batch].least))

        middle = sorted(study.batches)[len(study.batches) // 2]
        start = middle, 2.0 ** (curves[arm][middle].best + random.uniform(-2, 2))
        first = Replay(curves[arm], random)
        searches: dict[str, tuple[Replay, Chosen]] = {OURS: (first, ours(first, start, length))}
        each = round(first.trials / len(curves[arm]))
        for name, proposals in (("random", at_random), ("TPE", tpe)):
            replay = Replay(curves[arm], random)
            searches[name] = replay, one_by_one(replay, each, length, proposals)
        replay = Replay(curves[arm], random)
        searches["exhaustive"] = replay, exhaustive(replay, length)
        whole = replay.examples
        for name, (replay, chosen) in searches.items():
            for batch, curve in curves[arm].items():
                regret = curve.regret(chosen[batch]) if batch in chosen else math.exp(2) - 1
                share = replay.examples / whole
                rows.setdefault(name, []).append((regret, share, replay.trials / len(curves[arm])))
    return {name: np.array(found) for name, found in rows.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table; with --check, 1 if the sweep's own search misses a bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", nargs="?", type=Path, default=DATA, help="a sweep that tried many rates")
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args(arguments)
    found = study(options.sweep)
    print(f"{options.replays} replays on {len(found.arms) * len(found.batches)} cells of {found.name}")
    print("search         trials/cell of the grid regret: median    p90 within 5 %")
    for name, rows in replays(found, options.replays).items():
        regrets, share, trials = rows[:, 0], rows[:, 1].mean(), rows[:, 2].mean()
        median, p90, within = np.median(regrets), np.percentile(regrets, 90), np.mean(regrets <= 0.05)
        print(f"{name:14} {trials:11.1f} {share:11.3f} {median:14.3f} {p90:6.3f} {within:10.0%}")
        if name == OURS:
            bars = [
                Bar("regret of the sweep's own search, median", float(median), "<=", 0.03),
                Bar("the same, 90th percentile", float(p90), "<=", 0.15),
                Bar("its examples over the exhaustive grid's", float(share), "<=", 0.03),
            ]
    check_bars(bars, options.check)


if __name__ == "__main__":
    main()

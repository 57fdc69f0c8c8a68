"""The search, on curves whose best rate is known."""

import hashlib
import math
from dataclasses import replace

import pytest

from cluster.experiments.bowl import Bowl, forecast, surface
from cluster.experiments.search import Best, strand
from cluster.experiments.trials import Ask, Cell, Trial
from trainer.recipe.sweep import Sweep

BATCHES = (4, 16, 64, 256, 1024)
LENGTH = 100_000  # examples of the recipe


def sweep(**more):
    values = {
        "name": "s",
        "recipe": "r.yaml",
        "target": {"metric": "loss", "at_most": 0.2},
        "batches": BATCHES,
    }
    return Sweep.model_validate(values | more)


def best_octave(batch):
    """A rate that saturates: lr_max / (1 + 60/B)^0.7, in octaves."""
    return -2 - 0.7 * math.log2(1 + 60 / batch)


def steps_at(batch, x, noise=0.0):
    """S_min (1 + B_crit/B), worse away from the best rate, divergent far above it."""
    away = x - best_octave(batch)
    if away > 1.4:
        return math.inf
    return 40 * (1 + 80 / batch) * math.exp((0.2 if away < 0 else 0.5) * away**2 + noise)


def gauss(*parts):
    """A standard normal number that belongs to some values."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    one, other = (int.from_bytes(digest[i : i + 6], "big") / 2**48 for i in (0, 6))
    return math.sqrt(-2 * math.log(one + 1e-15)) * math.cos(2 * math.pi * other)


def trained(ask: Ask, noise=0.13) -> Trial:
    x = math.log2(ask.rate)
    steps = steps_at(ask.cell.batch, x, noise * gauss(ask.cell.batch, round(x, 6), ask.seed))
    if math.isinf(steps):
        end, taken = "diverged", 3
    else:
        end, taken = ("reached", math.ceil(steps)) if steps <= ask.limit else ("stopped", ask.limit)
    return ask.brought(
        end,
        taken,
        steps if end == "reached" else None,
        key=f"{ask.cell} {ask.rate} {ask.seed}",
        seconds=0.0,
        curve=() if end == "diverged" else ((taken, steps / taken),),
    )


def searched(of: Sweep, start=(64, 0.03), train=trained):
    """The rates that a search chooses, and the rounds that it asked for."""
    search = strand(of, "arm", (), start, lambda batch: max(1, LENGTH // batch))
    best, rounds, answer = {}, [], None
    try:
        while True:
            item = search.send(answer)
            answer = None
            if isinstance(item, Best):
                best[item.cell.batch] = item.rate
            else:
                rounds.append(item)
                answer = [train(ask) for ask in item]
    except StopIteration:
        return best, rounds


def regret(batch, rate):
    return steps_at(batch, math.log2(rate)) / steps_at(batch, best_octave(batch)) - 1


@pytest.mark.parametrize("start", [0.03, 0.0005, 3.0])
def test_the_best_rate_is_found_wherever_the_search_begins(start):
    best, _ = searched(sweep(), (64, start), lambda ask: trained(ask, noise=0))
    assert list(best) == list(BATCHES)
    assert max(regret(batch, rate) for batch, rate in best.items()) < 0.02


def test_noise_between_seeds_costs_little():
    best, rounds = searched(sweep())
    assert sorted(regret(batch, rate) for batch, rate in best.items())[2] < 0.03
    searches = [ask for asks in rounds for ask in asks if ask.stage == "search"]
    assert len(searches) <= 12 * len(BATCHES)


def test_the_best_rate_is_repeated_on_fresh_seeds():
    best, rounds = searched(sweep(seeds={"search": [11, 12], "report": 3}))
    reports = [asks for asks in rounds if asks[0].stage == "report"]
    assert [[ask.seed for ask in asks] for asks in reports] == [[0, 1, 2]] * len(BATCHES)
    assert {asks[0].cell.batch: asks[0].rate for asks in reports} == best


def test_a_rate_with_which_fresh_seeds_fail_is_lowered():
    def failing(ask):
        trial = trained(ask, noise=0)
        if ask.stage == "report" and ask.seed == 1 and math.log2(ask.rate) > best_octave(64) - 0.5:
            return replace(trial, end="stopped", steps=None)
        return trial

    best, rounds = searched(sweep(batches=[64]), train=failing)
    reports = [asks for asks in rounds if asks[0].stage == "report"]
    assert len(reports) > 1
    assert {ask.rate for ask in reports[-1]} == {best[64]}
    assert best[64] < 2 ** (best_octave(64) - 0.5)
    assert reports[0][0].rate / reports[1][0].rate == pytest.approx(2 ** (1 / 3))


def test_what_is_asked_for_depends_on_the_answers_alone():
    assert searched(sweep()) == searched(sweep(run={"groups": 7}))


def test_trials_are_given_up_by_what_the_neighbours_took():
    _, rounds = searched(sweep(stop={"after_best": 1.5}))
    began = {}
    for ask in (ask for asks in rounds for ask in asks if ask.stage == "search"):
        began.setdefault(ask.cell.batch, ask.limit)
    best = {batch: steps_at(batch, best_octave(batch)) for batch in BATCHES}
    assert began[256] < 2 * best[64]  # no batch needs more steps than a smaller one
    assert began[16] < 2 * best[64] * 4  # nor more examples than a larger one
    assert list(began) == [64, 256, 1024, 16, 4]


def test_a_target_that_no_rate_reaches_is_said_and_not_repeated():
    def never(ask):
        trial = trained(ask)
        return (
            trial if trial.end == "diverged" else Trial(**vars(trial) | {"end": "unreached", "steps": None})
        )

    best, rounds = searched(sweep(batches=[64]), train=never)
    assert best == {64: None}
    assert not any(ask.stage == "report" for asks in rounds for ask in asks)
    assert sum(map(len, rounds)) < 40


def test_a_budget_ends_the_search():
    def examples(of):
        rounds = searched(of)[1]
        return sum(trained(ask).examples for asks in rounds for ask in asks)

    spent = examples(sweep())
    assert examples(sweep(stop={"budget": {"examples": spent / 4}})) < spent / 2


def test_a_grid_tries_every_rate_on_every_seed():
    rates = [2.0**x for x in range(-9, 1)]
    best, rounds = searched(sweep(batches=[16, 64], rate={"search": "grid", "values": rates}))
    searches = [ask for asks in rounds for ask in asks if ask.stage == "search"]
    assert len(searches) == 2 * len(rates) * 2
    assert max(regret(batch, rate) for batch, rate in best.items()) < 0.1


def test_optuna_proposes_as_many_rates_as_it_may():
    pytest.importorskip("optuna")
    of = sweep(batches=[16, 64], rate={"search": "optuna", "trials": 12})
    best, rounds = searched(of)
    searches = [ask for asks in rounds for ask in asks if ask.stage == "search"]
    assert len(searches) == 2 * (12 + 1)  # the best one again, on the second seed
    assert max(regret(batch, rate) for batch, rate in best.items()) < 0.3
    assert searched(of) == (best, rounds)


def bowl(**values):
    """A bowl of reached trials from octaves to steps."""
    made = Bowl()
    for x, steps in values.items():
        ask = Ask(Cell("a", 4), 2.0 ** float(x[1:].replace("_", "-")), 0, "search", 10**9)
        made.add(ask.brought("reached", int(steps), steps, key="k", seconds=0.0))
    return made


def test_ties_go_to_the_lower_rate():
    assert bowl(x_2=100, x_1=101, x0=150).best(0.05) == -2
    assert bowl(x_2=110, x_1=100, x0=103).best(0.05) == -1
    assert bowl(x_2=110, x_1=100, x0=103).best(0.2) == -2


def test_the_surface_finds_the_law_of_the_rate():
    bowls = {}
    for batch in BATCHES:
        bowls[batch] = Bowl()
        for x in (-1, 0, 1):
            ask = Ask(Cell("a", batch), 2.0 ** (round(best_octave(batch)) + x), 0, "search", 10**9)
            bowls[batch].add(trained(ask, noise=0.05))
    found = surface(bowls)
    assert found == pytest.approx({batch: best_octave(batch) for batch in BATCHES}, abs=0.25)


def test_a_forecast_follows_the_neighbours():
    assert forecast({64: -3.0}, 128) == -2.5
    assert forecast({64: -3.0, 16: -4.0}, 256) == pytest.approx(-2.0)
    assert forecast({64: -3.0, 128: -3.2}, 256) == pytest.approx(-3.4)
    assert forecast({16: -5.0, 64: -3.0, 128: -2.0, 4: 9.0}, 256) == pytest.approx(-1.0)

"""Sweeps of real trials in this process: what they write, and that a sweep that was cut off ends the same."""

from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import pytest

from cluster.console import Console
from cluster.experiments import command
from cluster.experiments import plan as plans
from cluster.experiments import sweep as sweeps
from cluster.experiments.laws import StepsLaw, geometric_mean
from cluster.experiments.local_groups import LocalGroups
from cluster.experiments.trials import Cell, Study
from tests.cluster.experiments.tiny_sweep import SWEEP, facts
from trainer.distributed.group import WorkerGroup
from trainer.errors import RunFailed, UserError
from trainer.run_folder import journal, layout


class Cut(LocalGroups):
    """Groups that die after some rounds."""

    def __init__(self, rounds):
        super().__init__(1.1, WorkerGroup())
        self.rounds = rounds

    def submit(self, orders) -> Future:
        self.rounds -= 1
        if self.rounds < 0:
            raise RuntimeError("a machine has died")
        return super().submit(orders)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return read()


def read(*overrides):
    with open("sweep.yaml", "w") as file:
        file.write(SWEEP)
    return plans.read("sweep.yaml", overrides)


def run(plan, folder=None, groups=None, **options):
    folder = folder or sweeps.folder_of(plan, resume=False, extend=False, **options)

    @contextmanager
    def ready():
        yield groups or LocalGroups(1.1, WorkerGroup())

    sweeps.run(plan, sweeps.Lengths(plan), folder, ready, Console())
    return Study.read(folder)


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_a_sweep_that_was_cut_off_goes_on_and_trains_nothing_twice(plan, reduction):
    plan = read(f"recipe.run.reduction={reduction}", "batches=[64, 256]")
    whole = run(plan)
    folder = sweeps.folder_of(plan, resume=False, extend=False)
    for rounds in (0, 3, 5):
        with pytest.raises(RunFailed, match="a machine has died; `lockstep resume runs/tiny-002` goes on"):
            run(plan, folder, Cut(rounds))
    assert facts(run(plan, folder)) == facts(whole)
    lines = [line for line in journal.read(folder) if line["kind"] == "trial"]
    assert len(lines) == len(whole.trials)
    assert [line["status"] for line in journal.read(folder) if line["kind"] == "end"] == [
        *["FAILED"] * 3,
        "FINISHED",
    ]


def test_each_cell_has_a_rate_that_reaches_the_target_on_fresh_seeds(plan):
    study = run(plan)
    assert set(study.best) == {Cell(arm, batch) for arm in ("momentum", "lamb") for batch in (32, 64, 256)}
    for cell, rate in study.best.items():
        reports = study.at(cell, "report")
        assert {(t.rate, t.end) for t in reports} == {(rate, "reached")}
        assert [t.seed for t in reports] == [0, 1]
        assert all(0 < t.test["loss"] < 1.5 for t in reports)
        assert all(t.curve[-1][1] <= 0.6 < t.curve[-2][1] for t in reports)
        assert all(t.curve[-2][0] < t.steps <= t.curve[-1][0] for t in reports)
        best = min(t.steps for t in study.at(cell, "search") if t.steps)
        assert sum(t.steps for t in reports) / 2 < 2 * best
    for arm in ("momentum", "lamb"):
        steps = [study.at(Cell(arm, batch), "report")[0].steps for batch in (32, 256)]
        assert steps[0] > 1.5 * steps[1]
    fits = {line["arm"]: line["metrics"] for line in journal.read(study.folder) if line["kind"] == "fit"}
    assert fits.keys() == {"momentum", "lamb"}
    for arm, fit in fits.items():
        cells = [Cell(arm, batch) for batch in study.batches]
        means = [geometric_mean([t.steps for t in study.at(cell, "report")]) for cell in cells]
        assert fit["b_crit"] == pytest.approx(StepsLaw.fit(study.batches, means).b_crit, rel=1e-3)
        assert fit["b_crit_low"] < fit["b_crit"] < fit["b_crit_high"]
        assert {"s_min", "log_r2", "rate_exponent"} <= fit.keys()


class Cliff(LocalGroups):
    """Groups in which a fresh seed fails at the rates that are reported first."""

    def __init__(self):
        super().__init__(1.1, WorkerGroup())
        self.first = {}

    def submit(self, orders) -> Future:
        future: Future = Future()
        future.set_result([self.failed(order) for order in orders])
        return future

    def failed(self, order):
        (trial,) = self.runner.run([order])
        if (order.stage, order.seed) != ("report", 1):
            return trial
        is_first = self.first.setdefault(order.cell, order.rate) == order.rate
        return replace(trial, end="stopped", steps=None, trained_steps=order.limit) if is_first else trial


def test_a_lowered_rate_is_still_the_best_one_after_a_resume(plan):
    plan, groups = read("batches=[64, 256]"), Cliff()
    whole = run(plan, groups=groups)
    assert whole.best == {cell: pytest.approx(rate / 2 ** (1 / 3)) for cell, rate in groups.first.items()}
    assert run(plan, whole.folder, groups).best == whole.best


def test_a_trial_alone_and_stacked_are_the_same_to_rounding(plan):
    stacked = run(plan)
    groups = LocalGroups(1.1, WorkerGroup())
    groups.runner.alone = dict.fromkeys(plan.arms, "asked for")
    alone = run(plan, groups=groups)
    reports = [{(t.cell, t.seed): t for t in s.trials if t.stage == "search"} for s in (stacked, alone)]
    same = reports[0].keys() & reports[1].keys()
    assert len(same) > 8
    first = [one for one in same if all(r[one].rate == reports[0][one].rate for r in reports)]
    for one in first:
        a, b = (r[one] for r in reports)
        assert a.steps == pytest.approx(b.steps, rel=0.02) if a.steps else a.end == b.end


def test_a_finished_sweep_can_be_extended(plan):
    small = read("batches=[32, 64]")
    study = run(small)
    with pytest.raises(UserError, match=r"--resume: batches: not as in runs/tiny-001/sweep\.yaml"):
        sweeps.folder_of(plan, resume=True, extend=False)
    folder = sweeps.folder_of(plan, resume=False, extend=True)
    assert folder == study.folder
    more = run(plan, folder)
    before = {(t.key, t.stage) for t in study.trials if t.stage == "search"}
    assert before < {(t.key, t.stage) for t in more.trials}
    assert Cell("lamb", 256) in more.best
    with pytest.raises(UserError, match="--extend: target"):
        sweeps.folder_of(read("target.at_most=0.5"), resume=False, extend=True)


def test_where_a_sweep_is_tracked_may_change_when_it_goes_on(plan):
    study = run(read("batches=[64]", "recipe.track.uri=none"))
    again = read("batches=[64]", "recipe.track.experiment=other")
    assert sweeps.folder_of(again, resume=True, extend=False) == study.folder


def test_a_dry_run_says_how_many_trials_and_trains_none(plan, capsys):
    command.sweep("sweep.yaml", [], local=True, address=None, dry_run=True)
    printed = capsys.readouterr().out
    assert "cells    6, in 2 searches" in printed
    assert "trials   about 48: 6 in each search, and 2 fresh seeds" in printed
    assert "at most 38,912 in a trial" in printed  # 30 epochs of 1,297 examples, in whole batches
    assert not list(layout.runs_in("runs"))


def test_a_metric_that_the_task_has_not_is_told(plan):
    with pytest.raises(UserError, match=r"target\.metric: the task has no f1; it has"):
        run(read("target.metric=f1"))


def test_batches_beyond_the_data_are_refused_before_a_folder_is_made(plan):
    with pytest.raises(UserError, match="is 2048, and there are 1297 training examples"):
        sweeps.Lengths(read("batches=[64, 2048]"))
    assert not list(layout.runs_in("runs"))

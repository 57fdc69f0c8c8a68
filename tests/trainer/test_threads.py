"""How many threads a worker takes: no more than it was given, and fewer where that turns out to be better."""

import pytest

from trainer.adaptive.threads import WINDOW_STEPS, ThreadRevision
from trainer.compute import autotune
from trainer.compute.execution import Execution, cores_per_worker
from trainer.distributed.group import WorkerGroup


@pytest.mark.parametrize(
    ("given", "expected"), [("", 8), ("1", 1), ("3", 3), ("100", 8), ("4,2", 4), ("many", 8)]
)
def test_omp_num_threads_is_an_upper_bound(monkeypatch: pytest.MonkeyPatch, given: str, expected: int):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert cores_per_worker(2) == expected


def after(steps: int, compute_s: float, execution: Execution) -> Execution:
    revision = ThreadRevision(WorkerGroup())
    for step in range(1, steps + 1):
        execution = revision.after_step(step, compute_s, 4, execution)
    return execution


def test_steps_far_slower_than_the_trial_go_on_with_one_thread():
    chosen = Execution(threads=2, trial_s=0.01, reason="tried")
    assert after(WINDOW_STEPS, 4 * 0.01, chosen) is chosen
    assert after(WINDOW_STEPS - 1, 4 * 0.5, chosen) is chosen, "a few slow steps say nothing"
    revised = after(WINDOW_STEPS, 4 * 0.5, chosen)
    assert revised.threads == 1
    assert "50.0 times what the trial took on 2 threads" in revised.reason
    alone = Execution(threads=1, trial_s=0.01)
    assert after(WINDOW_STEPS, 4 * 0.5, alone) is alone
    exact = Execution()
    assert after(WINDOW_STEPS, 4 * 0.5, exact) is exact


def test_a_way_that_is_hopeless_is_tried_once(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def seconds(compute: object, micro_batches: object, way: Execution) -> float:
        seen.append(way.threads)
        return {1: 0.01, 2: 10.0}[way.threads]

    monkeypatch.setattr(autotune, "_seconds", seconds)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    trials = autotune._Trials(None, [])  # type: ignore[arg-type]
    trials.choose_the_quickest([0], threads=2)
    assert seen == [1, 2, 1, 1]
    assert trials.best.threads == 1
    assert trials.best.trial_s == 0.01

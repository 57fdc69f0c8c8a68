"""Who holds a group of workers up, and when that is said."""

from concurrent.futures import Future
from dataclasses import replace

import pytest

from cluster import watch
from cluster.watch import Hung, Watch
from trainer.distributed.pulse import Report

STEPPING = Report(5, 4, 0.5, True, None, "my_task.py:7 in loss")
WAITING = replace(STEPPING, waits_for="the other workers")
STARVED = replace(STEPPING, waits_for="the pool's examples")


class Group:
    """Workers that say what they are told to, or nothing, on a clock that is turned by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *says: Report | None) -> None:
        self.says, self.now_s = list(says), 0.0
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now_s)
        self.watch = Watch(len(says), 60.0, self.answer)

    def answer(self, rank: int) -> Future:
        answer: Future = Future()
        if (report := self.says[rank]) is not None:
            answer.set_result(report)
        return answer

    def after(self, seconds: int) -> Hung | None:
        """Look every second for some seconds; what is found, as soon as it is."""
        for _ in range(seconds):
            self.now_s += 1
            if (hung := self.watch.look()) is not None:
                return hung
        return None


def test_the_worker_that_the_others_wait_for_is_named_with_its_line_and_step(monkeypatch):
    group = Group(monkeypatch, WAITING, STEPPING, WAITING)
    assert group.after(60) is None
    hung = group.after(10)
    assert hung is not None
    assert hung.ranks == [1]
    assert hung.reason == "worker 1 has been at my_task.py:7 in loss for 60 s, in step 5"


def test_one_that_gives_no_answer_is_named_even_outside_of_steps(monkeypatch):
    group = Group(monkeypatch, replace(WAITING, in_step=False), None)
    hung = group.after(70)
    assert hung is not None
    assert hung.ranks == [1]
    assert hung.reason == "worker 1 gives no sign of life for 60 s, in step 5"


def test_workers_that_all_wait_for_each_other_are_all_named(monkeypatch):
    hung = Group(monkeypatch, WAITING, WAITING).after(70)
    assert hung is not None
    assert hung.ranks == [0, 1]
    assert hung.reason == "each of workers 0, 1 has waited for the others for 60 s, in step 5"


def test_who_moves_does_not_hang(monkeypatch):
    group = Group(monkeypatch, WAITING, STEPPING)
    for moves in range(20):
        group.says[1] = replace(STEPPING, moves=moves)
        assert group.after(55) is None


@pytest.mark.parametrize(
    "slow",
    [
        replace(STEPPING, longest_step_s=None),  # the first step compiles, reads, warms up
        replace(STEPPING, in_step=False),  # a long evaluation, a slow disk
        STARVED,  # a storage that is slow for a while
    ],
)
def test_what_no_step_measures_has_thirty_times_as_long(monkeypatch, slow: Report):
    group = Group(monkeypatch, slow, WAITING)
    assert group.after(1800) is None
    hung = group.after(10)
    assert hung is not None
    assert hung.ranks == [0]


def test_ten_steps_are_waited_for_where_steps_are_long(monkeypatch):
    group = Group(monkeypatch, replace(STEPPING, longest_step_s=30.0), WAITING)
    assert group.after(300) is None
    assert group.after(10) is not None


def test_the_time_in_which_the_driver_itself_slept_does_not_count(monkeypatch):
    group = Group(monkeypatch, STEPPING, None)
    group.now_s += 10_000
    assert group.after(50) is None

"""What a group does about workers that do not come up."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ray_workers import WorkerActors, WorkersHung
from trainer.errors import RunFailed


class Usable:
    """Places of which some are lost."""

    def __init__(self, *lost: int) -> None:
        self.lost = lost

    def is_usable(self, place: int) -> bool:
        return place not in self.lost


def worker(answer: Any = None) -> Any:
    """One that is ready, or fails, or says nothing."""
    future: Future = Future()
    if isinstance(answer, Exception):
        future.set_exception(answer)
    elif answer is not None:
        future.set_result(answer)
    return SimpleNamespace(ready=SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: future)))


def group(monkeypatch: pytest.MonkeyPatch, places: Usable, *workers: Any, lost: str | None = None) -> Any:
    """A group of workers in places 0, 2, 4 and so on, and the places whose workers it ends."""
    made = WorkerActors(places, lambda: lost)
    made.workers = {2 * rank: each for rank, each in enumerate(workers)}
    made.ended = []
    monkeypatch.setattr(made, "_end", lambda *ended: made.ended.extend(ended))
    return made


READY = ("node", "tcp://127.0.0.1:1")


def test_all_that_are_ready_answer_by_rank(monkeypatch):
    made = group(monkeypatch, Usable(), worker(READY), worker(("other", "address")))
    assert made._answers(60.0) == [READY, ("other", "address")]


def test_one_that_hangs_while_it_starts_is_named_and_ended(monkeypatch):
    made = group(monkeypatch, Usable(), worker(READY), worker())
    with pytest.raises(WorkersHung, match="worker 1 started for 0 s and did not come up"):
        made._answers(0.0)
    assert made.ended == [2]


@pytest.mark.parametrize("answer", [None, OSError("its node is gone")])
def test_where_a_place_is_lost_the_group_is_gathered_anew(monkeypatch, answer):
    made = group(monkeypatch, Usable(2), worker(READY), worker(answer))
    assert made._answers(60.0) is None


def test_an_error_of_one_whose_place_stands_is_raised(monkeypatch):
    made = group(monkeypatch, Usable(), worker(READY), worker(OSError("it died")))
    with pytest.raises(OSError, match="it died"):
        made._answers(60.0)


def test_a_cluster_that_dies_meanwhile_is_not_waited_for(monkeypatch):
    made = group(monkeypatch, Usable(), worker(), lost="Ray's raylet was killed")
    with pytest.raises(RunFailed, match="raylet was killed"):
        made._answers(60.0)

"""Pools: the same arrays from any process, also when processes are killed, and no process left running."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest

from data_echo import (
    DataError,
    EchoLoader,
    ExampleError,
    InlinePreparer,
    Preparer,
    PrepareRequest,
    ProcessPreparer,
    Schedule,
)
from tests.data_echo.pool_task import EXAMPLES, Changing, Task, Unbuildable


def requests(count: int = 12, n: int = 40) -> list[PrepareRequest]:
    rng = np.random.default_rng(0)
    return [
        PrepareRequest("train", rng.integers(0, 5, n), rng.integers(0, EXAMPLES, n)) for _ in range(count)
    ]


def assert_same_arrays(preparer: Preparer, asked: list[PrepareRequest], kill: Any = None) -> set[int]:
    inline, processes = InlinePreparer(Task(), 7), set()
    pending = [preparer.submit(request) for request in asked]
    for number, (request, one) in enumerate(zip(asked, pending, strict=True)):
        arrays, expected = preparer.collect(one), inline.collect(request)
        assert np.array_equal(arrays["index"], expected["index"])
        assert np.array_equal(arrays["drawn"], expected["drawn"])
        processes |= set(arrays["process"].tolist())
        if kill and number % 5 == 2:
            kill(sorted(processes))
    return processes


def assert_ended(processes: set[int]) -> None:
    assert processes
    assert not any(os.path.exists(f"/proc/{process}") for process in processes)


def test_processes_make_the_same_arrays() -> None:
    preparer = ProcessPreparer(Task, 7, 2)
    try:
        processes = assert_same_arrays(preparer, requests())
        assert os.getpid() not in processes
    finally:
        preparer.close()
    assert_ended(processes)


def test_killed_processes_are_replaced() -> None:
    preparer = ProcessPreparer(Task, 7, 2)

    def kill(seen: list[int]) -> None:
        with suppress(ProcessLookupError):  # it may have been killed before
            os.kill(seen[-1], signal.SIGKILL)

    try:
        processes = assert_same_arrays(preparer, requests(), kill)
    finally:
        preparer.close()
    assert len(processes) > 1


def test_errors_come_back_from_processes() -> None:
    preparer = ProcessPreparer(partial(Task, bad=3), 7, 1)
    try:
        with pytest.raises(ExampleError, match="train: example 3: ValueError: bad number"):
            preparer.collect(preparer.submit(PrepareRequest("train", np.zeros(2, int), np.array([2, 3]))))
        assert (
            preparer.collect(preparer.submit(PrepareRequest("train", np.zeros(1, int), np.array([2]))))[
                "index"
            ]
            == 2
        )
    finally:
        preparer.close()
    broken = ProcessPreparer(Unbuildable, 7, 1)
    try:
        with pytest.raises(DataError, match="task: RuntimeError: no such dataset"):
            broken.collect(broken.submit(requests(1)[0]))
    finally:
        broken.close()


def test_processes_that_saw_other_examples_refuse_the_same() -> None:
    """Each process gets requests of one dtype alone; the first example of the split tells which is wrong."""
    preparer = ProcessPreparer(Changing, 7, 2)
    try:
        late = PrepareRequest("train", np.zeros(2, int), np.array([EXAMPLES - 2, EXAMPLES - 1]))
        early = PrepareRequest("train", np.zeros(2, int), np.array([3, 4]))
        pending = [preparer.submit(request) for request in (late, late, early)]
        for refused in pending[:2]:
            with pytest.raises(DataError, match=r"y: int64 in example 0, float64 in example 298; one dtype"):
                preparer.collect(refused)
        assert preparer.collect(pending[2])["y"].tolist() == [3, 4]
    finally:
        preparer.close()


def test_no_processes_are_refused() -> None:
    with pytest.raises(DataError, match="pool: processes: 0; at least 1"):
        ProcessPreparer(Task, 7, 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """An embedded Ray of two logical CPUs, ended with its processes."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", include_dashboard=False, num_cpus=4, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_actors_make_the_same_arrays(cluster: Any) -> None:
    from data_echo.prepare.ray_pool import PoolPreparer, start_pool

    preparer = PoolPreparer(start_pool(Task, 7, 2))
    processes = assert_same_arrays(preparer, requests())
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.slow
def test_killed_actors_are_restarted_and_their_requests_repeated(cluster: Any) -> None:
    from data_echo.prepare.ray_pool import PoolPreparer, start_pool

    # Each example takes a while: otherwise all requests may be done before the first kill.
    preparer = PoolPreparer(start_pool(partial(Task, pause_s=0.002), 7, 2))
    processes = assert_same_arrays(preparer, requests(20), lambda alive: _kill(alive[-1]))
    assert len(processes) > 2


def _kill(process: int) -> None:
    if os.path.exists(f"/proc/{process}"):
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_actors_gone_for_good_are_left_out(cluster: Any) -> None:
    from data_echo.prepare.ray_pool import PoolPreparer, start_pool

    actors = start_pool(Task, 7, 2)
    preparer = PoolPreparer(actors)
    assert_same_arrays(preparer, requests(10), lambda _: cluster.kill(actors[0]))
    cluster.kill(actors[1])
    with pytest.raises(DataError, match="pool: no actor is left"):
        preparer.collect(preparer.submit(requests(1)[0]))


@pytest.mark.slow
def test_errors_come_back_from_actors(cluster: Any) -> None:
    from data_echo.prepare.ray_pool import PoolPreparer, start_pool

    preparer = PoolPreparer(start_pool(partial(Task, bad=3), 7, 1))
    with pytest.raises(ExampleError, match="train: example 3: ValueError: bad number") as caught:
        preparer.collect(preparer.submit(PrepareRequest("train", np.zeros(2, int), np.array([2, 3]))))
    assert caught.value.index == 3
    broken = PoolPreparer(start_pool(Unbuildable, 7, 1))
    with pytest.raises(DataError, match="task: RuntimeError: no such dataset"):
        broken.collect(broken.submit(requests(1)[0]))


@pytest.mark.slow
@pytest.mark.parametrize(("actors", "workers"), [(1, 1), (2, 3), (3, 2)])
def test_loaders_serve_the_same_through_kills(cluster: Any, actors: int, workers: int) -> None:
    from data_echo.prepare.ray_pool import PoolPreparer, start_pool

    schedule, inline = Schedule(EXAMPLES, 6, 8, 2, 128, 1), InlinePreparer(Task(), 7)
    pool, position = start_pool(Task, 7, actors), 1000  # as after a resume
    loaders = [
        EchoLoader(
            schedule, PoolPreparer(pool), lanes=range(worker, 6, workers), position=position, seed=7, depth=4
        )
        for worker in range(workers)
    ]
    rng, killed = np.random.default_rng(actors), 0
    for j in range(position, position + 300):
        batch, _ = loaders[j % 6 % workers].micro_batch(j)
        expected = schedule.micro_batch(j)
        arrays = inline.collect(PrepareRequest("train", expected.pass_number, expected.index))
        assert np.array_equal(batch["index"], arrays["index"])
        assert np.array_equal(batch["drawn"], arrays["drawn"])
        if rng.random() < 0.02:
            _kill(int(batch["process"][0]))
            killed += 1
    assert killed > 2
    for actor in pool:
        cluster.kill(actor)


@pytest.mark.slow
def test_the_pool_grows_and_shrinks_by_demand(cluster: Any) -> None:
    from data_echo.prepare.ray_pool import Growth, PoolPreparer, start_pool

    make_task = partial(Task, pause_s=0.002)
    growth = Growth("elastic", 3, make_task, 7, window_s=0.3)
    actors = start_pool(make_task, 7, 1)
    preparers = [PoolPreparer(actors, growth), PoolPreparer(actors, growth)]  # of two workers
    schedule = Schedule(EXAMPLES, 4, 8, 1, 0, 1)
    loaders = [
        EchoLoader(schedule, preparer, lanes=range(worker, 4, 2), seed=7, depth=6)
        for worker, preparer in enumerate(preparers)
    ]
    sizes, deadline = [], time.monotonic() + 60
    for j in range(10**9):
        if sizes and max(sizes) == 3 and j % 8 == 0:
            time.sleep(0.3)  # from here on, little is asked for
        batch, _ = loaders[j % 2].micro_batch(j)
        assert np.array_equal(batch["index"], schedule.micro_batch(j).index)
        sizes.append(preparers[0].processes)
        if max(sizes) == 3 and sizes[-1] == 1:
            break
        assert time.monotonic() < deadline, f"sizes {sorted(set(sizes))}"
    # Both workers share the actors that either adds.
    assert set(cluster.util.list_named_actors()) <= {"elastic-1", "elastic-2"}


@pytest.mark.slow
def test_pool_processes_start_without_torch(cluster: Any) -> None:
    from data_echo.prepare.ray_pool import start_pool

    actor = start_pool(dict, 7, 1)[0]
    loaded = cluster.get(actor.__ray_call__.remote(lambda _: "torch" in __import__("sys").modules))
    assert not loaded

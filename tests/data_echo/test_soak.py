"""Memory over a long run: bounded by the pending requests and the capacity, and flat."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_echo import EchoLoader, InlinePreparer, ProcessPreparer, Schedule
from data_echo.prepare.preparer import Preparer
from tests.data_echo.pool_task import HEAVY_BYTES, Heavy

CAPACITY, LANES, MICRO, DEPTH = 1024, 4, 64, 6
REQUEST_BYTES = 8 * 2**20  # the most that one request may bring
MB = 2**20


def resident_mb() -> float:
    """Memory of this process alone, in MB: without files, and without Ray's store, which it maps."""
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) / 1024


@contextmanager
def preparer_of(kind: str) -> Iterator[tuple[Preparer, Any]]:
    """A preparer, and a function that gives the MB of its arrays outside this process's own memory."""
    if kind == "inline":
        yield InlinePreparer(Heavy(), 0), lambda: 0.0
    elif kind == "processes":
        processes = ProcessPreparer(Heavy, 0, 2)
        try:
            yield processes, lambda: 0.0
        finally:
            processes.close()
    else:
        ray = pytest.importorskip("ray")
        from data_echo.prepare.ray_pool import PoolPreparer, start_pool

        ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
        try:
            yield PoolPreparer(start_pool(Heavy, 0, 2)), lambda: object_store_mb(ray)
        finally:
            ray.shutdown()


def object_store_mb(ray: Any) -> float:
    """MB of a pool's arrays in the node's object store."""
    from ray._private.internal_api import memory_summary

    summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    (used,) = re.findall(r"Plasma memory usage ([\d.]+) MiB", summary)
    return float(used)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inline", "processes", "actors"])
def test_memory_stays_flat(kind: str) -> None:
    """A run that passes 1.3 GB of examples through a buffer of 20 MB grows by nothing after its start."""
    schedule = Schedule(20_000, LANES, MICRO, 2, CAPACITY)
    with preparer_of(kind) as (preparer, stored_mb):
        loader = EchoLoader(schedule, preparer, lanes=range(LANES), depth=DEPTH)
        for j in range(500):
            loader.micro_batch(j)
        before, received, stored = resident_mb(), loader.counters()["received_bytes"], []
        for j in range(500, 2500):
            loader.micro_batch(j)
            if j % 250 == 0:
                stored.append(stored_mb())
        counters = loader.counters()
        assert counters["received_bytes"] - received > 1.2e9
        in_flight_mb = DEPTH * REQUEST_BYTES / MB
        assert resident_mb() - before < in_flight_mb
        # Ray frees unused arrays once a second, or when there are a hundred of them.
        assert max(stored) <= in_flight_mb + 100 * REQUEST_BYTES / MB, stored
        # Live examples, and for each lane what is left of a request; storage grows by quarters.
        rows = CAPACITY + LANES * (MICRO + 2 * 512)
        assert counters["buffer_bytes"] < 1.3 * rows * (HEAVY_BYTES + 8)

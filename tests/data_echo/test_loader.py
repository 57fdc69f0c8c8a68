"""The loader serves exactly what the schedule says, for any workers, position, pool and change of factor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_echo import (
    ArraySource,
    DataError,
    EchoLoader,
    ExampleError,
    InlinePreparer,
    PrepareRequest,
    Schedule,
)

EXAMPLES = 700


class Numbers:
    """A task whose examples hold their index and what was drawn for them."""

    def source(self, split: str) -> ArraySource:
        assert split == "train"
        return ArraySource({"index": np.arange(EXAMPLES)})

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        return {
            "index": example["index"],
            "drawn": draw.uniform(2),
            "small": np.uint8(example["index"] % 251),
        }


class Counting:
    """A preparer that counts pending requests."""

    def __init__(self) -> None:
        self._inner = InlinePreparer(Numbers(), seed=5)
        self.stats, self.processes = self._inner.stats, 1
        self.pending_requests = self.most = self.examples = 0
        self.sizes: list[int] = []

    def submit(self, request: PrepareRequest) -> Any:
        self.sizes.append(len(request.index))
        self.pending_requests += 1
        self.most = max(self.most, self.pending_requests)
        self.examples += len(request.index)
        return self._inner.submit(request)

    def collect(self, pending: Any) -> Any:
        self.pending_requests -= 1
        return self._inner.collect(pending)

    def close(self) -> None:
        self._inner.close()


def schedule_of(factor: float = 2, lanes: int = 6, **settings: Any) -> Schedule:
    return Schedule(EXAMPLES, lanes, 8, factor, 200, 3, **settings)


def loader_of(schedule: Schedule, lanes: Sequence[int], position: int = 0, **settings: Any) -> EchoLoader:
    return EchoLoader(schedule, Counting(), lanes=lanes, position=position, seed=5, **settings)


def assert_serves(loader: EchoLoader, schedule: Schedule, j: int) -> None:
    batch, _ = loader.micro_batch(j)
    expected = schedule.micro_batch(j)
    assert np.array_equal(batch["index"], expected.index)
    assert np.array_equal(batch["small"], expected.index % 251)
    assert batch["small"].dtype == torch.uint8
    # What was drawn before the echo depends on the pass, not on the copy.
    request = PrepareRequest("train", expected.pass_number, expected.index)
    assert np.array_equal(batch["drawn"], InlinePreparer(Numbers(), 5).collect(request)["drawn"])


@settings(max_examples=50)
@given(
    factor=st.sampled_from([1, 1.5, 2, 2.6, 4]),
    workers=st.integers(1, 3),
    position=st.integers(0, 2000),
    whole_batches=st.booleans(),
    depth=st.integers(1, 9),
)
def test_any_worker_serves_the_schedule_from_any_position(
    factor: float, workers: int, position: int, whole_batches: bool, depth: int
) -> None:
    schedule = schedule_of(factor, whole_batches=whole_batches)
    loaders = [
        loader_of(schedule, range(worker, 6, workers), position, depth=depth) for worker in range(workers)
    ]
    for j in range(position, position + 60):
        assert_serves(loaders[j % 6 % workers], schedule, j)
    fresh = sum(loader.counters()["fresh"] for loader in loaders)
    assert fresh == schedule.fresh_served(position + 60) - schedule.fresh_served(position)
    assert sum(loader.counters()["echoed"] for loader in loaders) == 60 * 8 - fresh


@settings(max_examples=25)
@given(
    position=st.integers(0, 150),
    changes=st.lists(st.tuples(st.integers(1, 80), st.sampled_from([1, 1.5, 2, 4])), min_size=1, max_size=4),
    workers=st.integers(1, 2),
)
def test_changes_reach_running_feeds(position: int, changes: list[tuple[int, float]], workers: int) -> None:
    schedule = schedule_of(1)
    loaders = [loader_of(schedule, range(worker, 6, workers), position, depth=3) for worker in range(workers)]
    j = position
    for wait, factor in changes:
        for _ in range(wait):
            assert_serves(loaders[j % 6 % workers], schedule, j)
            j += 1
        schedule.change(j, factor)
    for _ in range(120):
        assert_serves(loaders[j % 6 % workers], schedule, j)
        j += 1
    held = sum(loader.counters()["held"] for loader in loaders)
    assert held <= 6 * (schedule.span() + 2 * 512)


class Elastic(Counting):
    """A pool whose size and speed vary."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = np.random.default_rng(seed)

    def collect(self, pending: Any) -> Any:
        arrays = super().collect(pending)
        self.processes = int(self._random.integers(1, 9))
        self.stats.work_s = self.stats.examples * float(self._random.uniform(1e-5, 1e-2))
        return arrays


@settings(max_examples=25)
@given(factor=st.sampled_from([1, 1.5, 2.6]), position=st.integers(0, 500), pool=st.integers(0, 99))
def test_any_pool_serves_the_schedule(factor: float, position: int, pool: int) -> None:
    schedule, preparer = schedule_of(factor), Elastic(pool)
    loader = EchoLoader(schedule, preparer, lanes=range(6), position=position, seed=5)
    for j in range(position, position + 120):
        assert_serves(loader, schedule, j)
    assert len(set(preparer.sizes)) > 3, "requests did vary"


@settings(max_examples=25)
@given(
    decisions=st.lists(
        st.tuples(st.integers(1, 90), st.sampled_from([1, 1.5, 2, 4])), min_size=1, max_size=4
    ),
    workers=st.integers(1, 3),
    data=st.data(),
)
def test_a_resumed_feed_serves_what_was_decided_before(
    decisions: list[tuple[int, float]], workers: int, data: st.DataObject
) -> None:
    """A run that decides as it goes, and one that resumes anywhere and knows the whole journal."""
    live, resumed, j = schedule_of(1), schedule_of(1), 0
    loader, served = loader_of(live, range(6), depth=3), []
    for wait, factor in decisions:
        for _ in range(wait):
            served.append(loader.micro_batch(j)[0]["index"].tolist())
            j += 1
        live.change(j, factor)
        resumed.change(j, factor)
    for number in range(j, j + 100):
        served.append(loader.micro_batch(number)[0]["index"].tolist())
    position = data.draw(st.integers(0, len(served) - 1))
    loaders = [loader_of(resumed, range(worker, 6, workers), position) for worker in range(workers)]
    for number in range(position, len(served)):
        batch, _ = loaders[number % 6 % workers].micro_batch(number)
        assert batch["index"].tolist() == served[number]


@pytest.mark.parametrize("factor", [1, 1.5, 2, 2.6, 4])
def test_memory_is_bounded_by_capacity_and_requests(factor: float) -> None:
    schedule = schedule_of(factor)
    loader = loader_of(schedule, range(6), depth=4)
    sizes = set()
    for j in range(3000):
        loader.micro_batch(j)
        held = loader.counters()["held"]
        # Live examples, arrays that just came, and for each lane what is left of one request.
        assert held <= 200 + 6 * (8 + 512)
        if j > 1000:
            sizes.add(loader.counters()["buffer_bytes"])
    assert len(sizes) == 1


@pytest.mark.parametrize("depth", [1, 5])
def test_requests_ahead_are_bounded(depth: int) -> None:
    preparer = Counting()
    loader = EchoLoader(schedule_of(), preparer, lanes=range(6), seed=5, depth=depth)
    for j in range(500):
        loader.micro_batch(j)
    assert preparer.most <= depth + 1
    served = schedule_of().fresh_served(500)
    assert preparer.examples <= served + (depth + 6 + 1) * 512


@pytest.mark.gpu
@pytest.mark.parametrize("on_host", [False, True])
def test_cuda_serves_the_same(on_host: bool) -> None:
    schedule = schedule_of(2.6)
    loader = loader_of(schedule, range(6), device="cuda", on_host=on_host)
    for j in range(200):
        batch, draw = loader.micro_batch(j)
        assert {tensor.device.type for tensor in batch.values()} == {"cuda"}
        assert draw.uniform().device.type == "cuda"
        assert np.array_equal(batch["index"].cpu(), schedule.micro_batch(j).index)


def test_a_start_in_the_middle_reads_only_what_is_live() -> None:
    """At most a buffer's worth, apart from the fresh examples from there on."""
    schedule, preparer = Schedule(EXAMPLES, 4, 8, 2, 512, 3), Counting()
    position, served = 100_003, 400
    loader = EchoLoader(schedule, preparer, lanes=range(4), position=position, seed=5, depth=1)
    for j in range(position, position + served):
        loader.micro_batch(j)
    fresh = schedule.fresh_served(position + served) - schedule.fresh_served(position)
    assert preparer.examples <= fresh + 512 + 4 * schedule.span() + 6 * 512


def test_each_copy_is_augmented_anew_or_all_alike() -> None:
    def drawn(fresh_augment: bool) -> dict[tuple[int, int], set[float]]:
        loader = loader_of(schedule_of(3), range(6), fresh_augment=fresh_augment)
        seen: dict[tuple[int, int], set[float]] = {}
        for j in range(300):
            _, draw = loader.micro_batch(j)
            served = loader.served(j)
            for which, value in zip(
                zip(served.pass_number, served.index, strict=True), draw.uniform(), strict=True
            ):
                seen.setdefault((int(which[0]), int(which[1])), set()).add(float(value))
        return seen

    assert max(len(values) for values in drawn(True).values()) == 3
    assert max(len(values) for values in drawn(False).values()) == 1


class Poisoned(Numbers):
    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        if example["index"] == 17:
            raise ValueError("bad number")
        return super().prepare(example, draw)


def test_a_poisoned_example_is_named() -> None:
    loader = EchoLoader(schedule_of(), InlinePreparer(Poisoned(), 5), lanes=range(6))
    with pytest.raises(
        ExampleError,
        match=r"train: example 17: ValueError: bad number \(\S*test_loader.py:\d+\); repair or remove it",
    ) as caught:
        [loader.micro_batch(j) for j in range(200)]
    assert (caught.value.split, caught.value.index) == ("train", 17)


def test_a_poisoned_example_is_skipped_where_that_is_allowed() -> None:
    preparer = InlinePreparer(Poisoned(), 5, skip_bad=True)
    schedule = schedule_of()
    loader = EchoLoader(schedule, preparer, lanes=range(6), seed=5)
    stood_in = 0
    for j in range(400):
        batch, _ = loader.micro_batch(j)
        expected = schedule.micro_batch(j).index
        stood_in += int((expected == 17).sum())
        assert np.array_equal(batch["index"], np.where(expected == 17, 18, expected))
    assert stood_in > 1
    assert loader.counters()["skipped"] == 1
    assert preparer.stats.skipped["train", 17].cause.startswith("ValueError: bad number (")


def test_upstream_seconds_are_those_of_the_work() -> None:
    preparer = InlinePreparer(Numbers(), 5)
    loader = EchoLoader(schedule_of(), preparer, lanes=range(6), seed=5)
    assert loader.upstream_s() == 0
    for j in range(50):
        loader.micro_batch(j)
    assert loader.upstream_s() == preparer.stats.work_s / preparer.stats.examples
    assert preparer.stats.work_s <= loader.waited_s
    counters = loader.counters()
    assert counters["received_bytes"] == preparer.stats.examples * (8 + 2 * 4 + 1)
    assert counters["processes"] == 1


def test_no_depth_is_refused() -> None:
    with pytest.raises(DataError, match="loader: depth: 0 pending requests; at least 1"):
        loader_of(schedule_of(), [0], depth=0)


def test_requests_of_large_examples_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_echo.loader._REQUEST_BYTES", 20 * (8 + 2 * 4 + 1))
    monkeypatch.setattr("data_echo.loader._REQUEST_S", 1e9)
    schedule, preparer = schedule_of(), Counting()
    loader = EchoLoader(schedule, preparer, lanes=range(6), seed=5, depth=2)
    for j in range(300):
        assert_serves(loader, schedule, j)
    assert set(preparer.sizes[3:]) == {20}


def test_requests_of_slow_examples_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_echo.loader._REQUEST_S", 0.0)
    schedule, preparer = schedule_of(), Counting()
    loader = EchoLoader(schedule, preparer, lanes=range(6), seed=5, depth=2)
    for j in range(30):
        assert_serves(loader, schedule, j)
    assert set(preparer.sizes[3:]) == {1}


class AnyKind(Numbers):
    """One column for each dtype that a task may want."""

    dtypes = ("bool", "uint8", "int8", "int16", "uint16", "uint32", "int64", "uint64", "float16", "float64")

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        return {name: np.full((2, 3), example["index"] % 100).astype(name) for name in self.dtypes}


def test_any_dtype_is_served() -> None:
    schedule = schedule_of()
    loader = EchoLoader(schedule, InlinePreparer(AnyKind(), 5), lanes=range(6))
    for j in range(60):
        batch, _ = loader.micro_batch(j)
        for name, column in batch.items():
            expected = (schedule.micro_batch(j).index % 100).astype(name)
            assert column.numpy().dtype == name
            assert np.array_equal(column.numpy(), np.broadcast_to(expected[:, None, None], (8, 2, 3)))


class Wordy(Numbers):
    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        return {"text": "word"}


def test_text_is_refused() -> None:
    loader = EchoLoader(schedule_of(), InlinePreparer(Wordy(), 5), lanes=range(6))
    with pytest.raises(DataError, match="prepare: text: <U4 is no number; numbers or booleans"):
        loader.micro_batch(0)

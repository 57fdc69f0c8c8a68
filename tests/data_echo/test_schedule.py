"""The schedule's promises: exact counts, exact order, no repeats within a micro-batch, any position from its
number alone.
"""

from collections import Counter, defaultdict
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_echo import DataError, MicroBatch, Schedule, order_lines
from data_echo.order.schedule import LaneReader

FACTORS = st.sampled_from([1, 1.1, 1.25, 1.5, 2, 2.6, 3, 4, Fraction(7, 3)])


@st.composite
def schedules(draw, examples: st.SearchStrategy[int] | None = None) -> Schedule:
    lanes, micro, factor = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 8, 16])), draw(FACTORS)
    least = int(np.ceil(lanes * micro * (factor - 1)))
    capacity = draw(st.integers(least, max(4 * least, least + 1)))
    count = draw(st.integers(max(16, micro), 3000) if examples is None else examples)
    return Schedule(count, lanes, micro, factor, capacity, draw(st.integers(0, 9)))


def assert_same(ours: MicroBatch, theirs: MicroBatch) -> None:
    for field in fields(MicroBatch):
        assert np.array_equal(getattr(ours, field.name), getattr(theirs, field.name))


def copies_of_lane(schedule: Schedule, lane: int, lane_steps: int) -> dict[int, list[tuple[int, int, bool]]]:
    """Fresh number -> its appearances in order: (lane_step, echo, last)."""
    seen = defaultdict(list)
    for lane_step in range(lane_steps):
        served = schedule.micro_batch(lane_step * schedule.lanes + lane)
        for fresh, echo, last in zip(
            served.fresh.tolist(), served.echo.tolist(), served.last.tolist(), strict=True
        ):
            seen[fresh].append((lane_step, echo, last))
    return seen


@given(schedules())
def test_copies_come_in_order_and_end_where_they_say(schedule: Schedule) -> None:
    lane_steps = 60
    for appearances in copies_of_lane(schedule, schedule.lanes - 1, lane_steps).values():
        assert [echo for _, echo, _ in appearances] == list(range(len(appearances)))
        assert not any(last for _, _, last in appearances[:-1])


@given(schedules())
def test_fresh_examples_follow_the_shuffled_order(schedule: Schedule) -> None:
    for lane in range(schedule.lanes):
        served = [schedule.micro_batch(lane_step * schedule.lanes + lane) for lane_step in range(20)]
        fresh = np.concatenate([micro.fresh for micro in served])
        passes, index = schedule.order.example_of(lane, fresh)
        assert (passes == np.concatenate([micro.pass_number for micro in served])).all()
        assert (index == np.concatenate([micro.index for micro in served])).all()


@pytest.mark.parametrize("factor", [1, 1.1, 1.5, 2, 2.6, 4, Fraction(7, 3)])
def test_every_example_is_served_factor_times_in_the_mean(factor: float) -> None:
    schedule = Schedule(5000, 2, 4, factor, 64)
    seen = copies_of_lane(schedule, 0, 1500)
    finished = [len(appearances) for appearances in seen.values() if appearances[-1][2]]
    unfinished = [len(appearances) for appearances in seen.values() if not appearances[-1][2]]
    assert set(finished) <= {int(np.floor(factor)), int(np.ceil(factor))}
    assert len(unfinished) <= 2 * (schedule.span() + schedule.micro)
    # Over whole blocks the count is exact up to one micro-batch of the last repeats.
    done = min((fresh for fresh, appearances in seen.items() if not appearances[-1][2]), default=len(seen))
    served = sum(len(seen[fresh]) for fresh in range(done))
    assert abs(served - factor * done) <= 2 * schedule.span()
    assert served / done == pytest.approx(float(factor), abs=0.05)


@given(schedules(), st.integers(0, 400))
def test_served_is_factor_times_fresh_within_the_fill(schedule: Schedule, j: int) -> None:
    factor = schedule.factor(0)
    fresh = schedule.fresh_served(j)
    held = factor * fresh - j * schedule.micro  # copies still owed
    assert -factor * schedule.lanes <= held
    assert held <= factor * schedule.lanes * schedule.span()


@given(schedules(), st.integers(0, 200))
def test_fresh_served_counts(schedule: Schedule, j: int) -> None:
    counted = sum(int((schedule.micro_batch(number).echo == 0).sum()) for number in range(j))
    assert schedule.fresh_served(j) == counted


@given(schedules())
def test_fresh_demand_is_even(schedule: Schedule) -> None:
    """Once the buffer is full, each micro-batch asks for its share of fresh examples, up to rounding."""
    factor, lanes = schedule.factor(0), schedule.lanes
    filled = next(
        lane_step for lane_step in range(10_000) if schedule.first_live(lane_step) > 0 or factor == 1
    )
    counts = [int((schedule.micro_batch((filled + n) * lanes).echo == 0).sum()) for n in range(60)]
    even = schedule.micro / factor
    period_batches = factor * schedule.span() / schedule.micro / int(np.ceil(factor))
    # A period has a whole number of micro-batches, and each of them a whole number of fresh examples.
    bound = 1 + even / (period_batches - 1)
    assert max(counts) <= even + bound
    assert min(counts) >= even - bound


@given(schedules(examples=st.integers(900, 4000)))
def test_no_example_twice_in_a_micro_batch(schedule: Schedule) -> None:
    """Where the data outnumber what the lanes hold, and a period has two micro-batches to swap between."""
    assume(schedule.span() * schedule.lanes < schedule.order.examples)
    assume(schedule.factor(0) >= 2 or schedule.span() >= 2 * schedule.micro * np.ceil(schedule.factor(0)))
    for j in range(150):
        index = schedule.micro_batch(j).index.tolist()
        assert len(set(index)) == len(index)


def test_repeats_where_passes_meet_are_swapped_away() -> None:
    schedule = Schedule(1500, 4, 64, 2, 512)
    without = 0
    for j in range(600):
        served = schedule.micro_batch(j)
        assert len(set(served.index.tolist())) == 64
        without += served.pass_number.min() != served.pass_number.max()
    assert without > 50  # passes did meet


def test_factor_one_is_the_plain_stream() -> None:
    schedule = Schedule(640, 4, 8)
    index = np.concatenate([schedule.micro_batch(j).index for j in range(240)]).reshape(3, 640)
    assert (np.sort(index, axis=1) == np.arange(640)).all()
    served = schedule.micro_batch(7)
    assert (served.fresh == 8 + np.arange(8)).all()
    assert served.last.all()
    assert (served.echo == 0).all()


@given(schedules(), st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
def test_any_position_is_reached_alone(schedule: Schedule, positions: list[int]) -> None:
    other = Schedule(
        schedule.order.examples,
        schedule.lanes,
        schedule.micro,
        schedule.factor(0),
        schedule.capacity,
        schedule.order.seed,
    )
    for position in sorted(positions):
        for j in (position, position + 1):
            assert_same(schedule.micro_batch(j), other.micro_batch(j))
    assert schedule.fresh_served(positions[0]) == other.fresh_served(positions[0])


@given(schedules(), st.integers(1, 3), st.integers(0, 300))
def test_lane_readers_read_the_same(schedule: Schedule, workers: int, position: int) -> None:
    readers = [LaneReader(schedule, range(worker, schedule.lanes, workers)) for worker in range(workers)]
    for j in range(position, position + 40):
        read = readers[j % schedule.lanes % workers].micro_batch(j)
        assert_same(read, schedule.micro_batch(j))


@given(schedules(), st.integers(0, 100))
def test_what_a_lane_needs_is_what_it_serves(schedule: Schedule, lane_step: int) -> None:
    lane = 0
    first, following = schedule.needs(lane, lane_step)
    served: set[int] = set()
    for number in range(lane_step, lane_step + 120):
        served |= set(schedule.micro_batch(number * schedule.lanes + lane).fresh.tolist())
    below = {fresh for fresh in served if fresh < following}
    assert set(first.tolist()) == below
    assert len(set(first.tolist())) == len(first)
    assert min(served) >= schedule.first_live(lane_step)


@given(
    schedules(examples=st.integers(2000, 4000)), st.lists(st.tuples(st.integers(0, 120), FACTORS), max_size=3)
)
def test_changed_factors_keep_the_order_of_fresh_examples(
    schedule: Schedule, changes: list[tuple[int, float]]
) -> None:
    schedule.capacity = 4 * schedule.lanes * schedule.micro
    position = 0
    for distance, factor in changes:
        asked = position + distance
        position = schedule.change(asked, factor)
        assert position >= asked
        assert position % schedule.lanes == 0
    end = position + 100
    fresh_of_lane = defaultdict(list)
    for j in range(end):
        served = schedule.micro_batch(j)
        assert schedule.fresh_served(j) == sum(len(numbers) for numbers in fresh_of_lane.values())
        fresh_of_lane[j % schedule.lanes] += served.fresh[served.echo == 0].tolist()
    for numbers in fresh_of_lane.values():
        assert (
            sorted(numbers)[: -schedule.span() or None]
            == list(range(len(numbers)))[: -schedule.span() or None]
        )


@given(st.lists(st.tuples(st.integers(1, 90), st.sampled_from([1, 1.5, 2, 3])), min_size=1, max_size=5))
def test_replayed_decisions_give_the_same_stream(decisions: list[tuple[int, float]]) -> None:
    """A run that decides as it goes, and one that knows all decisions from its journal."""
    live, replayed, served = Schedule(3000, 3, 8, 1, 96, 2), Schedule(3000, 3, 8, 1, 96, 2), []
    for wait, factor in decisions:
        served += [live.micro_batch(j) for j in range(len(served), len(served) + wait)]
        assert live.change(len(served), factor) == replayed.change(len(served), factor) >= len(served)
    served += [live.micro_batch(j) for j in range(len(served), len(served) + 100)]
    for j, micro in enumerate(served):
        assert_same(micro, replayed.micro_batch(j))


def test_changes_are_reached_at_the_end_of_a_period() -> None:
    schedule = Schedule(5000, 4, 8, 1, 128)
    position = schedule.change(17, 2)
    echoes = [int((schedule.micro_batch(j).echo > 0).sum()) for j in range(position + 200)]
    assert sum(echoes[:position]) == 0
    assert sum(echoes[position + 100 :]) == pytest.approx(400, abs=16)
    assert schedule.change(20, 3) == position
    assert (schedule.factor(position - 1), schedule.factor(position)) == (1, 3)
    assert schedule.largest_factor() == 5
    schedule.change(position, 5)
    with pytest.raises(DataError, match="capacity: 128"):
        schedule.change(position + 1000, 5.25)


@given(st.sampled_from([2, 1.5, 3]), st.integers(1, 4))
def test_whole_batches_echo_together(factor: float, lanes: int) -> None:
    schedule = Schedule(4000, lanes, 8, factor, 64 * lanes, whole_batches=True)
    seen = Counter(tuple(schedule.micro_batch(j).fresh.tolist()) for j in range(0, 300 * lanes, lanes))
    assert all(
        numbers == tuple(range(numbers[0], numbers[0] + 8)) and numbers[0] % 8 == 0 for numbers in seen
    )
    assert max(seen.values()) <= np.ceil(factor)
    assert sum(seen.values()) / len(seen) == pytest.approx(factor, rel=0.1)


def test_age_is_bounded() -> None:
    free, bound = Schedule(9000, 2, 4, 2.5, 512), Schedule(9000, 2, 4, 2.5, 512, max_age=600)

    def oldest(schedule: Schedule) -> int:
        ages = [copies[-1][0] - copies[0][0] for copies in copies_of_lane(schedule, 0, 800).values()]
        return max(ages) * schedule.lanes * schedule.micro

    assert oldest(bound) <= 600 < oldest(free)
    with pytest.raises(DataError, match=r"max_age: 10 .*; at least 60"):
        Schedule(9000, 2, 4, 2.5, 512, max_age=10)


def test_echoes_are_shuffled() -> None:
    schedule = Schedule(50_000, 1, 64, 2, 1024)
    lists = copies_of_lane(schedule, 0, 200).values()
    waits = np.array([copies[1][0] - copies[0][0] for copies in lists if len(copies) == 2])
    assert waits.std() > 5  # blocks of 16 micro-batches: a copy comes anywhere in the next period of 32
    neighbours = schedule.micro_batch(150)
    repeated = neighbours.fresh[neighbours.echo == 1]
    assert np.abs(np.diff(repeated)).mean() > 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 2, "capacity": 511}, "capacity: 511 examples .* factor 2; at least 512"),
        ({"factor": 0.5}, "factor: 0.5 serves examples less than once; at least 1"),
        ({"micro": 0}, "micro: 0 of 9000 examples; between 1 and 9000"),
        ({"micro": 9001}, "micro: 9001 of 9000"),
        ({"lanes": 0}, "lanes: 0"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Schedule(**{"examples": 9000, "lanes": 8, "micro": 64, **settings})


def test_the_order_can_be_read() -> None:
    schedule = Schedule(10, 2, 2, 2, 4, 1)
    lines = list(order_lines(schedule, 8))
    assert len(lines) == 8
    for j, line in enumerate(lines):
        served = schedule.micro_batch(j)
        head, examples = line.split(": ")
        assert head == f"{j} lane {j % 2}"
        for text, pass_number, index, echo in zip(
            examples.split(), served.pass_number, served.index, served.echo, strict=True
        ):
            assert text == f"{pass_number}:{index}" + (f"+{echo}" if echo else "")
    assert list(order_lines(schedule, 3, first=5)) == lines[5:]


def test_the_least_capacity_works() -> None:
    schedule = Schedule(9000, 8, 64, 2, 512)
    assert schedule.fresh_served(800) == pytest.approx(400 * 64, rel=0.02)

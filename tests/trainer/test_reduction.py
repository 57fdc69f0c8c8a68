"""Sums that do not depend on order, and buckets that travel in one order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.distributed.fixed_point import FixedPointSum
from trainer.distributed.group import WorkerGroup
from trainer.distributed.reduction import ExactReduction, _buckets

ALONE = WorkerGroup()
finite = st.floats(-(2.0**70), 2.0**70, width=32)


def fixed_point(vectors: list[list[float]]) -> torch.Tensor:
    total = FixedPointSum(len(vectors[0]), len(vectors), ALONE.device)
    for vector in vectors:
        total.add(torch.tensor(vector))
    return total.over(ALONE)


@given(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=20), st.randoms())
def test_a_fixed_point_sum_does_not_depend_on_order(vectors, random):
    shuffled = list(vectors)
    random.shuffle(shuffled)
    assert torch.equal(fixed_point(vectors), fixed_point(shuffled))


@given(st.lists(st.tuples(finite), min_size=1, max_size=50))
def test_a_fixed_point_sum_is_the_sum(vectors):
    exact = sum(np.longdouble(value) for (value,) in vectors)
    scale = max(abs(value) for (value,) in vectors)
    assert abs(float(fixed_point(vectors)[0]) - float(exact)) <= len(vectors) * (2.0**-60 + 2.0**-50 * scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**82])
def test_what_does_not_fit_spoils_the_whole_sum(bad):
    assert fixed_point([[1.0, 2.0], [bad, 2.0]]).isnan().all()


def test_spoilt_gradients_are_not_trained_on():
    flat = SimpleNamespace(gradients=[torch.tensor([1.0, float("inf")])])
    reduction = ExactReduction(ALONE, SimpleNamespace(flat=flat), 1, 1)
    reduction.begin()
    reduction.add(torch.ones(1))
    reduction.finish()
    assert flat.gradients[0].isnan().all()


class Flat:
    """A layout of parameters in rows of four, as an optimizer would give it."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.places, end = {}, 0
        for parameter in parameters:
            self.places[parameter] = (0, end, parameter.numel())
            end += -(-parameter.numel() // 4) * 4
        self.gradients = [torch.zeros(end)]

    def place(self, parameter: torch.Tensor) -> tuple[int, int, int]:
        return self.places[parameter]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(16, 400))
def test_buckets_cover_the_buffer_once_from_its_end(sizes, bucket_bytes):
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    flat = Flat(parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.distributed.reduction.FIRST_BUCKET_BYTES", bucket_bytes // 2)
        patch.setattr("trainer.distributed.reduction.BUCKET_BYTES", bucket_bytes)
        buckets, bucket_of = _buckets(flat, parameters)
    for number, bucket in enumerate(buckets, start=1):
        bucket += number
    assert (flat.gradients[0] > 0).all(), "every element travels"
    assert sum(bucket.numel() for bucket in buckets) == flat.gradients[0].numel(), "none travels twice"
    order = [bucket_of[parameter] for parameter in reversed(parameters)]
    assert order == sorted(order), (
        "a backward pass, which goes from the last parameter to the first, fills them in order"
    )
    for parameter in parameters:
        _, start, numel = flat.place(parameter)
        assert (flat.gradients[0][start : start + numel] == bucket_of[parameter] + 1).all()

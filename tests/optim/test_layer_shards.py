"""Layers that are cut over workers, here threads: every rule does what it does with whole layers."""

import threading

import numpy as np
import pytest
import torch

import optim
from optim.engine.shards import LayerShard
from tests.optim import cases

SHAPES = [
    (7, 5),
    (4,),
    (6, 3, 2, 2),
    (5, 5),
    (1, 6),
    (12, 20),
    (1, 3, 4),
    (2, 9, 8),
    (9, 2, 11),
    (48, 16, 3, 3),
]
ROUNDS = {
    "lion": [],
    "adax": [],
    "lars": ["sum"],
    "lamb": ["sum"],
    "novograd": ["sum"],
    "amos": ["sum"],
    "funnelled_sgdm": ["sum"],
    "sm3": ["max"],
    "adafactor": ["sum", "sum"],
}
SETTINGS = [(name, {}) for name in ROUNDS] + [
    ("lamb", {"max_grad_norm": 1.0}),
    ("sm3", {"variant": "I", "momentum": 0.9}),
    ("adafactor", {"beta1": 0.9}),
]
each_setting = pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)


class Workers:
    """Threads that train parts of layers, whose `reduce` waits for all of them."""

    def __init__(self, workers):
        self.workers, self.barrier = workers, threading.Barrier(workers)
        self.vectors, self.rounds = [None] * workers, []

    def reduce(self, rank):
        def complete(vector, how):
            self.vectors[rank] = vector.clone()
            self.barrier.wait(60)
            together = torch.stack(self.vectors)
            vector.copy_(together.sum(0) if how == "sum" else together.amax(0))
            if rank == 0:
                self.rounds.append(how)
            self.barrier.wait(60)

        return complete

    def run(self, function):
        made, errors = [None] * self.workers, []

        def call(rank):
            try:
                made[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.workers)]
        [thread.start() for thread in threads]
        [thread.join(120) for thread in threads]
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return made


def shard(shape, rank, workers):
    """As fully_shard cuts: slices of equal length as far as they go."""
    inner, size = int(np.prod(shape[1:])), -(-shape[0] // workers)
    return LayerShard(torch.Size(shape), *(min(r * size, shape[0]) * inner for r in (rank, rank + 1)))


def in_parts(name, options, workers, history, engine, flatten=False, dtype=torch.float64):
    """Train parts of layers; the whole layers at the end, the rounds, and the optimizers."""
    start, gradients, rates = history
    threads, optimizers = Workers(workers), [None] * workers

    def train(rank):
        shards = [shard(a.shape, rank, workers) for a in start]
        mine = cases.tensors([a[s.rows] for a, s in zip(start, shards, strict=True)], dtype)
        optimizer = optimizers[rank] = cases.built(name, mine, engine, flatten, **options)
        optimizer.shards = dict(zip(mine, shards, strict=True))
        optimizer.reduce = threads.reduce(rank)
        cut = [[g[s.rows] for g, s in zip(step, shards, strict=True)] for step in gradients]
        return [p.detach().numpy() for p in cases.train(optimizer, cut, rates)]

    parts = threads.run(train)
    return [np.concatenate(each) for each in zip(*parts, strict=True)], threads.rounds, optimizers


@pytest.mark.parametrize("workers", [2, 3])
@each_setting
def test_parts_of_layers_move_as_whole_layers_do(name, options, workers):
    history = cases.history(SHAPES, steps=20)
    whole = cases.train(cases.built(name, cases.tensors(history[0]), "tensor", **options), *history[1:])
    for engine, flatten in [("tensor", False), ("rows", False), ("rows", True)]:
        parts, rounds, _ = in_parts(name, options, workers, history, engine, flatten)
        for p, part in zip(whole, parts, strict=True):
            np.testing.assert_allclose(part, p.detach().numpy(), rtol=1e-10, atol=1e-12)
        expected = ROUNDS[name] + (["sum"] if "max_grad_norm" in options else [])
        assert rounds == 20 * expected


@pytest.mark.parametrize("workers", [2, 3])
@each_setting
def test_the_exact_engine_moves_parts_bitwise_as_whole_layers(name, options, workers):
    history = cases.history([*SHAPES, (2100, 7)], steps=10)
    start, *rest = history
    whole = cases.train(cases.built(name, cases.tensors(start, torch.float32), "exact", **options), *rest)
    reference = cases.train(
        cases.built(name, cases.tensors(start, torch.float32), "tensor", **options), *rest
    )
    parts, _, _ = in_parts(name, options, workers, history, "exact", dtype=torch.float32)
    for p, part, q in zip(whole, parts, reference, strict=True):
        assert part.tobytes() == p.detach().numpy().tobytes()
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_exact_sums_of_what_is_not_finite_are_not_finite():
    p = cases.tensors([np.ones((4, 3))], torch.float32)[0]
    p.grad = torch.full_like(p, torch.inf)
    optimizer = optim.LARS([p], engine="exact")
    optimizer.step()
    assert not p.isfinite().any()


@pytest.mark.slow
@each_setting
def test_parts_of_layers_move_as_whole_layers_do_in_compiled_code(name, options):
    history = cases.history([(65, 1000), (3, 70, 130), (1, 20000), (4,)], steps=4)
    whole = cases.train(cases.built(name, cases.tensors(history[0]), "tensor", **options), *history[1:])
    parts, _, _ = in_parts(name, options, 2, history, "compiled")
    for p, part in zip(whole, parts, strict=True):
        np.testing.assert_allclose(part, p.detach().numpy(), rtol=1e-9, atol=1e-11)


def test_state_of_parts_is_that_of_the_whole_layer_and_goes_on_where_it_was_saved():
    history = cases.history(SHAPES, steps=4)
    for name, options in SETTINGS:
        whole = cases.built(name, cases.tensors(history[0]), "rows", **options)
        cases.train(whole, *history[1:])
        _, _, optimizers = in_parts(name, options, 2, history, "rows")
        for rank, optimizer in enumerate(optimizers):
            saved = optimizer.state_dict()["state"]
            for number, shape in enumerate(SHAPES):
                part = shard(shape, rank, 2)
                for key, value in whole.state_dict()["state"][number].items():
                    if isinstance(value, torch.Tensor):
                        np.testing.assert_allclose(
                            saved[number][key], part.part(value), rtol=1e-9, atol=1e-12
                        )
            optimizer.load_state_dict(whole.state_dict())  # whole tensors: each worker takes its part
            for number, shape in enumerate(SHAPES):
                p = optimizer.param_groups[0]["params"][number]
                for key, value in whole.state_dict()["state"][number].items():
                    if isinstance(value, torch.Tensor):
                        assert torch.equal(optimizer.state[p][key], shard(shape, rank, 2).part(value))


def test_parts_that_nothing_completes_are_refused():
    p = cases.tensors([np.ones((4, 3))])[0]
    p.grad = torch.ones_like(p)
    optimizer = optim.LAMB([p])
    optimizer.shards = {p: LayerShard(torch.Size((8, 3)), 0, 12)}
    with pytest.raises(ValueError, match="nothing completes their sums"):
        optimizer.step()
    optimizer.shards = {}
    optimizer.reduce = lambda vector, how: None
    with pytest.raises(ValueError, match="no layer is known to be cut"):
        optimizer.step()
    optimizer.shards = {p: LayerShard(torch.Size((8, 3)), 0, 9)}
    with pytest.raises(ValueError, match="no run of whole slices"):
        optimizer.step()


def test_a_loaded_state_of_another_shape_is_refused():
    p = cases.tensors([np.ones((4, 3))])[0]
    optimizer = optim.Lion([p])
    optimizer.shards = {p: LayerShard(torch.Size((8, 3)), 0, 12)}
    optimizer.reduce = lambda vector, how: None
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["m"] = torch.ones(5, 3)
    with pytest.raises(ValueError, match=r"shape \(5, 3\), where the whole layer's has \(8, 3\)"):
        optimizer.load_state_dict(saved)

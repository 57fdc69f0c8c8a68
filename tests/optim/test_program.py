"""Programs do what the functions do that they were made of."""

import random
from types import SimpleNamespace

import pytest
import torch

from optim.engine.stage import Stage, largest, total
from optim.engine.tracer import ARRAY, LINE, NUMBER, SMALL, program_of
from tests.optim import cases

NUMBERS = {
    "x": 0.7,
    "y": -1.3,
    "one": 1.0,
    "zero": 0.0,
    "maximize": False,
    "ratio": torch.tensor(0.4, dtype=torch.float64),
}


def ran(function, arrays, sums=(), shape="line"):
    """The arrays and sums after a program's run, and those after its function's; None without program."""
    stage = Stage(function, sums)
    known = {name: NUMBERS[name] for name in ("one", "zero", "maximize")}
    varying = {"x": NUMBER, "y": NUMBER, "ratio": SMALL}
    kinds = {name: ARRAY if a.shape == arrays["p"].shape else LINE for name, a in arrays.items()}
    program = program_of(stage, tuple(kinds.items()), tuple(known.items()), tuple(varying.items()), shape)
    if program is None:
        return None
    mine, theirs = ({name: a.clone() for name, a in arrays.items()} for _ in range(2))
    found = program.run(
        *[mine[name] for name in program.arrays],
        *[NUMBERS[name] for name in program.numbers],
        *[torch.tensor(NUMBERS[name], dtype=torch.float64) for name in program.tensors],
        *[torch.full_like(arrays["p"], float("nan")) for _ in range(program.temporaries)],
        frozenset(),
    )
    expected = stage.run(SimpleNamespace(**NUMBERS), theirs)
    return (mine, found), (theirs, expected), program


def random_function(seed):
    """A function of p, g and m that does a dozen arbitrary things."""

    def function(h, p, g, m):
        chance = random.Random(seed)
        made = [p, g, m, p - h.x * g]
        for _ in range(12):
            a, b = chance.choice(made), chance.choice(made)
            number = chance.choice([h.x, h.y, h.one, h.zero, h.ratio, 0.25, h.x * h.y, 1 - h.x])
            made.append(
                chance.choice(
                    [
                        lambda a, b, n: a + b,
                        lambda a, b, n: a - n * b,
                        lambda a, b, n: n * a + b,
                        lambda a, b, n: a * b,
                        lambda a, b, n: n * (a - b) * b,
                        lambda a, b, n: a / (b * b + 1.0),
                        lambda a, b, n: a + n * b / (a * a + 1.0),
                        lambda a, b, n: n - a,
                    ]
                )(a, b, number)
            )
            made[-1] = made[-1] if isinstance(made[-1], float) else torch.clamp(made[-1], -9.0, 9.0)
        return {"m": made[-1], "p": made[-2], "u": made[-3], "s": (made[-1], p), "q": (made[-4], made[-4])}

    return function


@pytest.mark.parametrize("seed", range(150))
def test_a_program_does_what_its_function_does(seed):
    generator = torch.Generator().manual_seed(seed)
    arrays = {name: torch.randn(5, generator=generator, dtype=torch.float64) for name in ("p", "g", "m", "u")}
    both = ran(random_function(seed), arrays, ("s", "q"))
    if both is None:  # a result was no array but a number
        return
    (mine, found), (theirs, expected), _ = both
    for name in arrays:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-12, atol=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_most_functions_have_a_program():
    arrays = {name: torch.ones(5, dtype=torch.float64) for name in ("p", "g", "m", "u")}
    assert sum(ran(random_function(seed), arrays, ("s", "q")) is not None for seed in range(150)) > 100


def test_products_and_sums_are_one_operation_and_zeros_none():
    def function(h, p, g, m):
        m = h.x * m + h.y * g * g
        return {"p": p - h.x * (m / (g + h.x) + h.zero * p), "m": h.one * m}

    arrays = {name: torch.rand(5, dtype=torch.float64) for name in ("p", "g", "m")}
    _, _, program = ran(function, arrays)
    assert program.source.count("torch.") == 4
    assert program.temporaries == 1


def test_marginals_go_on_where_blocks_before_ended():
    def function(h, p, g):
        return {"rows": total(g), "columns": largest(g * g), "p": p + g}

    start = {"p": torch.zeros(4, 3), "rows": torch.zeros(4, 1), "columns": torch.zeros(1, 3)}
    start["g"] = torch.arange(12.0).view(4, 3).flip(0)
    _, _, program = ran(function, {name: x.double() for name, x in start.items()}, shape="whole")
    for part, goes_on in ((slice(0, 3), frozenset()), (slice(3, 4), frozenset(["columns"]))):
        mine = {name: x if name == "columns" else x[part] for name, x in start.items()}
        scratch = [torch.empty_like(mine["p"]) for _ in range(program.temporaries)]
        program.run(*[mine[name] for name in program.arrays], *scratch, goes_on)
    assert torch.equal(start["rows"], start["g"].sum(1, keepdim=True))
    assert torch.equal(start["columns"], start["g"].square().amax(0, keepdim=True))
    assert torch.equal(start["p"], start["g"])


def test_what_decides_by_values_has_no_program():
    def function(h, p, g):
        return {"p": p - g if h.x > 0 else p + g}

    assert ran(function, {"p": torch.ones(3), "g": torch.ones(3)}) is None


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("name", "options"), cases.settings(cases.OWN))
def test_blocks_may_end_anywhere(name, options, flatten, monkeypatch):
    """With blocks of a few rows, larger tensors are cut, and tables where layers do not end."""
    options = {key: value for key, value in options.items() if key != "lr"}
    start, gradients, rates = cases.history([(40, 30), (16, 16, 3, 3), (5000,), (7,), (3, 700)], steps=4)

    def trained(engine):
        optimizer = cases.built(name, cases.tensors(start), engine, flatten, **options)
        return cases.train(optimizer, gradients, rates)

    whole = trained("tensor")
    monkeypatch.setattr("optim.engine.chunks.SMALL", 2048)
    monkeypatch.setattr("optim.engine.chunks.BLOCK_BYTES", 4 * 8 * 1024 // torch.get_num_threads())
    for p, q in zip(trained("rows"), whole, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)

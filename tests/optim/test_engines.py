"""The engines agree, hold no more memory than they must, and compile once."""

import re
from collections import defaultdict

import numpy as np
import pytest
import torch

import optim
from optim.flat import ROW
from tests.optim import cases

SHAPES = [(300, 200), (64, 3, 3, 3), (70000,), (64,), (33, 65), ()]


def trained(name, engine, flatten, steps=5, **options):
    start, gradients, rates = cases.history(SHAPES, steps)
    for step in gradients:
        step[0][0, 0] = 0.5
    optimizer = cases.built(name, cases.tensors(start, torch.float32), engine, flatten, **options)
    optimizer.travelled = defaultdict(float)  # how far each state of one number went, back and forth
    for gradient, rate in zip(gradients, rates, strict=True):
        before = {place: float(value) for place, value in single_numbers(optimizer)}
        parameters = cases.train(optimizer, [gradient], [rate])
        for place, value in single_numbers(optimizer):
            optimizer.travelled[place] += abs(float(value) - before.get(place, 0.0))
    return optimizer, parameters


def single_numbers(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in enumerate(parameters):
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                yield (number, key), value


def takes_signs(name):
    functions = [function for function in optim.registry.rules()[name].stages if function is not None]
    return any({"sign", "sign_"} & set(function.__code__.co_names) for function in functions)


def agree(name, one, other):
    (optimizer_a, a), (optimizer_b, b) = one, other
    for number, (p, q) in enumerate(zip(a, b, strict=True)):
        flips = 0.02 if takes_signs(name) else 0.0  # a sign of nothing may fall either way: 2 lr
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6 * float(q.abs().max()) + flips)
        for key, value in optimizer_b.state[q].items():
            if not isinstance(value, torch.Tensor):
                continue
            mine = optimizer_a.state[p][key]
            if key == "log_s":  # an inner product of unrelated vectors, whose terms cancel
                torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-6)
                continue
            # The steps of a single number may cancel, and each of them is rounded as large as it was.
            size = max(float(value.abs().max()), optimizer_b.travelled[number, key])
            torch.testing.assert_close(mine, value, rtol=0, atol=2e-6 * size + 1e-12)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("name", "options"), cases.settings(cases.OWN))
def test_blocks_of_rows_agree_with_whole_tensors_in_fp32(name, options, flatten):
    options = {key: value for key, value in options.items() if key != "lr"}
    agree(name, trained(name, "rows", flatten, **options), trained(name, "tensor", False, **options))


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
    for module in ("chunks", "layout"):
        monkeypatch.setattr(f"optim.engine.{module}.BLOCK_BYTES", 4 * 8 * 1024 // torch.get_num_threads())
    monkeypatch.setattr("optim.engine.layout.SLAB_BYTES", 4 * 8 * 1024 // torch.get_num_threads())
    for p, q in zip(trained("rows"), whole, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["adafactor", "sm3"])
def test_later_blocks_join_statistics_of_earlier_ones_in_bf16(name):
    """A bf16 matrix of several blocks: its columns' statistics are those of all blocks, not of the last."""
    start, gradients, rates = cases.history([(2048, 1024), (4,)], steps=3)

    def trained(engine):
        optimizer = cases.built(name, cases.tensors(start, torch.bfloat16), engine)
        return optimizer, cases.train(optimizer, gradients, rates)

    (rows, [p, _]), (whole, [q, _]) = trained("rows"), trained("tensor")
    assert len(rows._engine.layout.chunks) > 2
    # Sums in another order may turn one rounding of bf16, which is a step at the size a weight had then.
    largest = torch.maximum(q.abs().float(), torch.tensor(start[0]).abs().float())
    assert ((p.float() - q.float()).abs() <= 2**-7 * largest + 1e-6).all()
    for key, value in whole.state[q].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(rows.state[p][key], value, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", cases.OWN)
def test_compiled_tables_agree_and_compile_once(name, flatten):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    agree(name, trained(name, "compiled", flatten, steps=8), trained(name, "tensor", False, steps=8))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    stages = (len(optim.registry.rules()[name].stages) + 1) // 2
    # Rules of dimensions meet tensors of several ranks and taps; all others compile each stage once. Muon's
    # matrices go through torch's products as they are.
    of_dimensions = name in ("adafactor", "sm3", "adam_mini", "came")
    assert (name != "muon") <= graphs <= (4 if of_dimensions else 1) * stages


def test_a_compiled_table_agrees():
    """The smallest case of the compiled engine, with the rate changing: one stage, one table."""
    agree("lion", trained("lion", "compiled", True), trained("lion", "tensor", False))


def test_without_a_compiler_the_compiled_engine_goes_in_blocks(monkeypatch):
    monkeypatch.setattr("optim.engine.engine.has_compiler", lambda device: False)
    compiled, rows = trained("lamb", "compiled", True), trained("lamb", "rows", True)
    assert all(torch.equal(p, q) for p, q in zip(compiled[1], rows[1], strict=True))


def test_where_compiling_fails_tables_go_in_blocks(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("torch.compile", lambda function, backend: fails)
    optim.engine.compiler.compiled.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no such instruction"):
            compiled = trained("lamb", "compiled", True)
    finally:
        optim.engine.compiler.compiled.cache_clear()
    agree("lamb", compiled, trained("lamb", "tensor", False))


def test_small_models_never_compile(monkeypatch):
    monkeypatch.setattr(
        "optim.engine.engine.has_compiler", lambda device: pytest.fail("asked for a compiler")
    )
    trained("lamb", "auto", True)


def state_tensors(optimizer):
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def unique_bytes(optimizer):
    held = state_tensors(optimizer)
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in held}
    return sum(storages.values())


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("engine", [*cases.ENGINES, pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", cases.OWN)
def test_states_take_the_memory_that_they_say(name, engine, flatten):
    shapes = [(512, 512), (512,), (100, 30)]
    start, gradients, _ = cases.history([(8, 6), *shapes], steps=1)
    optimizer = cases.built(name, cases.tensors(start[1:], torch.float32), engine, flatten)
    cases.train(optimizer, [gradients[0][1:]])
    numbers = sum(int(np.prod(shape)) for shape in shapes)
    state = optim.describe(name).partition("State:")[2].partition("Defaults:")[0]
    said = re.search(r"([\d.]+) bytes per parameter", " ".join(state.split()))
    per_parameter = float(said[1]) if said else 0.0
    slots = int(per_parameter) // 4
    exact = optim.state_bytes(name, shapes)
    # Not said there: single numbers of each tensor, what is held of rows and columns of small matrices, and
    # the second moment of vectors.
    holds_lines = name in ("adafactor", "sm3", "adam_mini", "came", "muon")
    assert abs(exact - per_parameter * numbers) <= 16 * len(shapes) + 5000 * holds_lines
    padding = 4 * ROW * len(shapes) * max(slots, 1) if engine != "tensor" else 0
    assert exact <= unique_bytes(optimizer) <= exact + padding


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("name", cases.OWN)
def test_nothing_is_kept_that_grows(name, engine, flatten):
    """After the second step every array that the optimizer holds stays the one it was."""
    start, gradients, rates = cases.history(steps=6)
    optimizer = cases.built(name, cases.tensors(start, torch.float32), engine, flatten)

    def arrays():
        layout = optimizer._engine.layout
        held = [
            v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)
        ]
        held += [x for scratch in layout._scratch for x in scratch.values()]
        held += [x for buffers in layout._buffers.values() for x in buffers]
        return sorted(x.data_ptr() for x in held)

    cases.train(optimizer, gradients[:2], rates)
    after_two = arrays()
    cases.train(optimizer, gradients[2:], rates)
    assert arrays() == after_two


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "sm3"])
def test_factored_rules_compile_for_few_rows_too(name):
    start, gradients, rates = cases.history([(3, 8192), (30, 1000), (700, 33)], steps=2)
    compiled, whole = (
        cases.built(name, cases.tensors(start, torch.float32), e) for e in ("compiled", "tensor")
    )
    for p, q in zip(
        cases.train(compiled, gradients, rates), cases.train(whole, gradients, rates), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6 * float(q.detach().abs().max()))

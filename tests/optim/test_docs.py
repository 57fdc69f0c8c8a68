"""The page about optimizers: its table is the generated one, its example works as it stands."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import optim
import optim.rules
import tests.oracles
from tests.optim import cases

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()


def test_the_table_is_the_generated_one():
    shown = PAGE.partition("<!-- optim.table() -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == optim.table(), "write the output of optim.table() into docs/optimizers.md"


@pytest.fixture
def signum(tmp_path, monkeypatch):
    """The page's example, put where its rule and its oracle would be."""
    _, rule, oracle = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for folder, source, package in (("rules", rule, optim.rules), ("oracles", oracle, tests.oracles)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "signum.py").write_text(source)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / folder)])
    for cached in (optim.registry.rules, optim.registry.names):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (optim.registry.rules, optim.registry.names):
        cached.cache_clear()


def test_the_example_is_an_optimizer_like_all_others(signum):
    assert "signum" in optim.names()
    assert optim.hyperparameters("signum") == {"lr": 1e-4, "momentum": 0.9, "maximize": False}
    assert "| `signum` | Signum. Bernstein et al. 2018" in optim.table()
    assert optim.state_bytes("signum", [(8, 8)]) == 256
    oracle = importlib.import_module("tests.oracles.signum")
    start, gradients, rates = cases.history(steps=20)
    for options in oracle.OPTIONS:
        expected, _ = oracle.oracle(start, gradients, rates, **options)
        for engine in cases.ENGINES:
            optimizer = optim.build("signum", cases.tensors(start), engine=engine, **options)
            for p, reference in zip(cases.train(optimizer, gradients, rates), expected, strict=True):
                np.testing.assert_allclose(p.detach().numpy(), reference, rtol=1e-12, atol=1e-14)

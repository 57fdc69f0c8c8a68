"""The page about optimizers: its table is the generated one, its example works as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import optim

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "optimizers.md").read_text()

PLUGIN = """
import optim.rules
import tests.oracles

optim.rules.__path__ = [*optim.rules.__path__, {rules!r}]
tests.oracles.__path__ = [*tests.oracles.__path__, {oracles!r}]
"""


def test_the_table_is_the_generated_one():
    shown = PAGE.partition("<!-- optim.table() -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == optim.table(), "write the output of optim.table() into docs/optimizers.md"


def test_the_example_passes_all_tests_that_are_made_for_each_rule(tmp_path):
    """The page's rule and oracle, put where the page says, in a process of their own."""
    *_, rule, oracle = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for folder, source in (("rules", rule), ("oracles", oracle)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "signum.py").write_text(source)
    paths = {folder: str(tmp_path / folder) for folder in ("rules", "oracles")}
    (tmp_path / "with_example.py").write_text(PLUGIN.format(**paths))
    command = [sys.executable, "-m", "pytest", "-p", "with_example", "-k", "signum", "tests/optim"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    [passed] = re.findall(r"(\d+) passed", ran.stdout)
    assert int(passed) > 60

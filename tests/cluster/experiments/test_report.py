"""Reports of sweeps, runs and reference tables: text, tables, figures, and the page."""

import csv
import io
import itertools
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cluster.experiments.curve import Curve, Point, curves
from cluster.experiments.forecast import Prediction
from cluster.experiments.promises import Promise, outcome
from cluster.experiments.references import mlperf
from cluster.experiments.report import charts, page, parts, text
from cluster.experiments.report.figures import Figure, drawing
from cluster.experiments.report.findings import Findings, references
from cluster.experiments.report.report import report
from cluster.experiments.trials import Cell, Study, Trial, crossing
from tests.cluster.experiments import digits_study
from trainer.errors import UserError
from trainer.recipe import loader


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_study.folder(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def part(sweep: Path) -> parts.Part:
    return parts.of_sweep(Study.read(sweep))


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    pytest.importorskip("matplotlib")
    return {figure.name: figure for figure in charts.draw(Findings.of(digits_study.study()))}


def table(part: parts.Part, title: str) -> parts.Table:
    return next(each for each in part.tables if each.title == title)


def test_a_report_has_the_laws_of_every_arm(part: parts.Part):
    laws = table(part, "Laws")
    assert [row[0] for row in laws.rows] == list(digits_study.OPTIMIZERS)
    for row, curve in zip(laws.rows, digits_study.digits().values(), strict=True):
        told = dict(zip(laws.header, row, strict=True))
        assert told["B_crit"] == f"{curve.steps_law.b_crit:,.0f}"
        low, high = map(int, told["95 %"].split(" to "))
        assert low < int(told["B_crit"]) < high
        assert told["trials"] == str(curve.trials)
    assert sum(curve.trials for curve in digits_study.digits().values()) == len(digits_study.study().trials)


def test_the_steps_are_geometric_means_of_the_reported_seeds(part: parts.Part):
    at_64 = next(row for row in table(part, "Steps to the target").rows if row[0] == "64")
    runs = [t.steps for t in digits_study.study().at(Cell("sgd", 64), "report")]
    assert at_64[1] == f"{np.exp(np.mean(np.log(runs))):,.0f}"


def test_csv_has_a_line_per_point(part: parts.Part):
    rows = list(csv.DictReader(io.StringIO(text.comma_separated([part]))))
    assert len(rows) == 45
    row = next(row for row in rows if (row["curve"], row["batch"]) == ("adam", "512"))
    assert float(row["examples"]) == pytest.approx(512 * float(row["steps"]), rel=1e-4)
    assert (row["runs"], row["missed"], row["at the edge"]) == ("20", "0", "false")


def test_markdown_tables_have_as_many_cells_in_every_line(part: parts.Part):
    lines = text.markdown([part]).splitlines()
    for before, line in itertools.pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            assert before.count("|") == line.count("|")
    assert "# digits-stacked" in lines


class Page(HTMLParser):
    """What a page would load, whether its elements close, and the texts to hover over."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open, self.loads, self.tips, self.figures = [], [], 0, 0
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.loads += [given[name] for name in ("src", "href", "xlink:href") if given.get(name)]
        self.tips += given.get("class") == "tip"
        self.figures += given.get("class") == "figure"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(part: parts.Part, figures: dict[str, Figure]):
    drawn = replace(part, figures=lambda: list(figures.values()))
    content = page.page([drawn, parts.of_references()])
    read = Page(content)
    assert not read.open
    assert all(address.startswith("#") for address in read.loads)
    assert not re.findall(r"@import|url\((?!#)", content)
    assert read.figures == 11
    assert read.tips > 300


def test_texts_of_a_page_are_escaped():
    told = parts.Part("<b>", "a & b", (parts.Table("<i>", ("", "<u>"), (("<s>", "1"),)),))
    content = page.page([told])
    assert not re.search(r"<(b|i|u|s)>", content)
    assert "a &amp; b" in content


def test_a_sweep_has_its_figures_and_each_has_texts(figures: dict[str, Figure]):
    assert list(figures) == ["steps", "examples", "rates", "bowls", "arms", "cost", "forecasts"]
    assert all(figure.tips and figure.caption for figure in figures.values())


def test_figures_are_drawn_the_same_twice():
    pytest.importorskip("matplotlib")
    first, second = (charts.draw(references()) for _ in range(2))
    assert [figure.svg() for figure in first] == [figure.svg() for figure in second]


def test_stopped_trials_are_hollow(figures: dict[str, Figure]):
    figure = figures["bowls"]
    stopped = [a for axes in figure.plot.axes for a in axes.lines if a.get_marker() == "^"]
    assert stopped
    assert {line.get_markerfacecolor() for line in stopped} == {"none"}
    told = [figure.tips[line.get_gid()] for line in stopped]
    assert all("stopped" in each or "unreached" in each or "diverged" in each for each in told)


@pytest.mark.parametrize("name", ["examples", "cost"])
def test_arms_that_share_axes_differ_without_color(figures: dict[str, Figure], name: str):
    lines = [line for line in figures[name].plot.axes[0].lines if not line.get_label().startswith("_")]
    assert len({line.get_marker() for line in lines}) == len(digits_study.OPTIMIZERS)


def test_the_noise_scale_is_shown_only_where_there_is_one():
    pytest.importorskip("matplotlib")
    lines = [
        line | ({"noise_scale": 36.0} if line["kind"] == "trial" else {}) for line in digits_study.lines()
    ]
    with drawing() as make:
        assert charts.noise(Findings.of(digits_study.study()), make) is None
        figure = charts.noise(Findings.of(Study.of(Path("x"), lines)), make)
    assert figure is not None
    assert any(told.startswith("sgd: noise scale 36, critical batch 2") for told in figure.tips.values())


def test_reference_tables_are_reported_by_themselves(tmp_path: Path):
    told = report([], str(tmp_path), reference="mlperf")
    assert "resnet50-lars" in told
    assert re.search(r"bert-lamb +183 +12,724", told)
    assert {curve.name for curve in references().curves} == set(mlperf())


def test_own_forecasts_are_made_from_smaller_batches_alone(part: parts.Part):
    own = table(part, "Forecasts of its own largest batches")
    assert {row[0] for row in own.rows} == {
        f"{a}, {b}" for a in digits_study.OPTIMIZERS for b in ("256", "512", "1,024")
    }
    assert sum(row[-1] == "held" for row in own.rows) >= 12


def _lines_with_echo(factors: dict[float, float]) -> list[dict]:
    """A sweep of one arm at two batches whose steps depend on the echo factor."""
    lines = [
        {
            "kind": "sweep",
            "name": "echo",
            "target": {"metric": "loss", "at_most": 1.0},
            "arms": ["a"],
            "batches": [8, 16],
        }
    ]
    for factor, steps in factors.items():
        for batch in (8, 16):
            trial = Trial(
                f"{factor}{batch}", Cell("a", batch, (("echo.factor", factor),)), 0.1, 1, "report",
                "reached", steps * 8 / batch, 100, 800, 1.0,
            )  # fmt: skip
            lines.append({"kind": "trial", **trial.fields()})
            lines.append(
                {"kind": "best", "arm": "a", "batch": batch, "axes": {"echo.factor": factor}, "rate": 0.1}
            )
    return lines


def test_echo_efficiency_counts_fresh_examples():
    """Twice the steps of echoes at factor 4 would be half the fresh examples."""
    told = parts.of_sweep(Study.of(Path("x"), _lines_with_echo({1: 100, 2: 100, 4: 200})))
    assert table(told, "Echo efficiency").rows == (("a, 8", "2.00", "2.00"), ("a, 16", "2.00", "2.00"))


def test_unreached_seeds_and_rates_at_an_edge_are_told():
    lines = digits_study.lines()
    for line in lines:
        if line["kind"] == "trial" and (line["arm"], line["batch"], line["seed"]) == ("sgd", 32, 11):
            line |= {"steps": None, "end": "unreached"}
    lines = [
        line
        for line in lines
        if not (line["kind"] == "trial" and line["batch"] == 64 and line["rate"] > 1.01)
    ]
    sgd = next(curve for curve in curves(Study.of(Path("x"), lines)) if curve.name == "sgd")
    by_batch = {point.batch: point for point in sgd.points}
    assert (by_batch[32].failed, by_batch[64].is_edge) == (1, True)
    assert by_batch[32].steps == np.median([*by_batch[32].runs, np.inf])
    told = table(parts.of_sweep(Study.of(Path("x"), lines)), "Laws")
    assert dict(zip(told.header, told.rows[0], strict=True))["runs missed"] == "32"


def test_runs_that_fall_short_count_as_longer_than_all_others():
    point = Point(8, (10.0, 12.0, 20.0), failed=2)
    assert (point.steps, point.is_usable) == (20.0, True)
    assert not Point(8, (10.0, 12.0), failed=2).is_usable


def test_a_sweep_that_found_nothing_yet_is_reported():
    first = digits_study.lines()[0]
    told = parts.of_sweep(Study.of(Path("x"), [first]))
    assert "0 trials" in text.terminal([told])
    one = Curve("a", (Point(8, (10.0,), 0.1), Point(16, (5.0,), 0.2)))
    assert one.steps_law is None


def test_a_target_is_crossed_between_two_evaluations():
    lower, higher = digits_study.study().target, loader.parse(_RECIPE).train.target
    assert crossing([(10, 0.4), (20, 0.1)], lower) == pytest.approx(10 * 2 ** (2 / 3))
    assert crossing([(10, 0.8), (40, 1.0)], higher) == pytest.approx(20)
    assert crossing([(10, 0.4)], lower) is None
    assert crossing([(10, 0.1)], lower) == 10
    assert crossing([(10, float("nan")), (20, 0.1)], lower) == 20


_RECIPE = """
name: line
task: {use: trainer.tasks.digits:Digits}
batch: {size: 64, micro: 64}
optimizer: {name: momentum, lr: 0.1}
train: {epochs: 1, target: {metric: accuracy, at_least: 0.9}}
"""


def _run(parent: Path, name: str, *lines: dict) -> Path:
    folder = parent / f"{name}-001"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        loader.dump(loader.parse(_RECIPE.replace("name: line", f"name: {name}")))
    )
    (folder / "journal.jsonl").write_text("".join(json.dumps({"time": 1.0} | line) + "\n" for line in lines))
    return folder


def _evaluation(step: int, loss: float) -> dict:
    return {
        "kind": "evaluation",
        "split": "validation",
        "step": step,
        "examples": step * 64,
        "metrics": {"loss": loss},
    }


def _promise(run: str) -> Promise:
    return Promise("abcd", run, Cell("sgd", 64), 0.1, Prediction(64, 15, 20, 30, 0.8))


@pytest.mark.parametrize(
    ("lines", "steps", "verdict"),
    [
        ([_evaluation(10, 0.4), _evaluation(40, 0.1)], 25.2, "held"),
        ([_evaluation(40, 0.4), _evaluation(80, 0.1)], 63.5, "missed"),
        ([_evaluation(40, 0.4), {"kind": "end", "status": "FINISHED"}], None, "target not reached"),
        ([_evaluation(40, 0.4), {"kind": "end", "status": "KILLED"}], None, "killed"),
        ([_evaluation(40, 0.4)], None, "running or cut off"),
        ([_evaluation(40, 0.1), {"kind": "rewind", "step": 20}, _evaluation(30, 0.1)], 30, "held"),
    ],
)
def test_a_run_grades_the_forecast_that_was_given_for_it(
    tmp_path: Path, lines: list, steps: float, verdict: str
):
    graded = outcome(_promise("line"), _run(tmp_path, "line", *lines), digits_study.study().target)
    assert graded.steps == (None if steps is None else pytest.approx(steps, abs=0.1))
    assert graded.verdict == verdict


def test_a_run_is_reported_with_its_course_and_its_forecast(tmp_path: Path):
    sweep = digits_study.folder(tmp_path)
    with open(sweep / "journal.jsonl", "a") as file:
        file.write(json.dumps({"kind": "forecast", "time": 1.0, **_promise("line").fields()}) + "\n")
    step = {"kind": "step", "step": 40, "examples": 2560, "fresh": 2560, "loss": 0.1, "learning_rate": 0.1}
    lines = [_evaluation(10, 0.4), step | {"batch": 64, "step_s": 0.01}, _evaluation(40, 0.1)]
    _run(tmp_path, "line", *lines, {"kind": "end", "status": "FINISHED", "metrics": {"loss": 0.2}})
    told = report(["line"], str(tmp_path))
    assert "6,400 examples/s, 10.0 ms a step" in told
    assert re.search(r"test loss +0\.2", told)
    assert re.search(r"abcd .* 15 to 30 +25 +held", told)
    assert "abcd" in report(["digits-001"], str(tmp_path))


def test_what_cannot_be_reported_is_refused(tmp_path: Path, sweep: Path):
    with pytest.raises(UserError, match=r"nope: is no run in .*; there are digits-001"):
        report(["nope"], str(sweep.parent))
    with pytest.raises(UserError, match="name sweeps or runs"):
        report([], str(tmp_path))
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"--html .*cannot be written .*give a file's path"):
        report([], str(tmp_path), "mlperf", html=tmp_path / "no" / "x.html")


def test_figures_without_matplotlib_are_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib, which is not installed; install it with"):
        report([], str(tmp_path), "mlperf", html=tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
    assert "bert-lamb" in report([], str(tmp_path), "mlperf")


def test_figures_are_written_as_svg_and_png(tmp_path: Path):
    pytest.importorskip("matplotlib")
    told = report([], str(tmp_path), reference="mlperf", figures=tmp_path / "out")
    files = {path.name for path in (tmp_path / "out/MLPerf").iterdir()}
    assert files == {
        f"{name}.{kind}" for name in ("steps", "examples", "rates", "forecasts") for kind in ("svg", "png")
    }
    assert "8 files written" in told

"""Journals, manifests and folders that were damaged or edited: left out with a word, never a traceback."""

import io
import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import runs
from cluster.advice import how_to_go_on
from cluster.console import Console
from cluster.experiments.promises import promises
from trainer.recipe.checkpoint import Best
from trainer.run_folder import journal, layout
from trainer.run_folder.checkpoints import Checkpoints
from trainer.run_folder.decisions import Decisions
from trainer.run_folder.journal_lines import FIELDS, wrong_with
from trainer.run_folder.outcome import Outcome
from trainer.tracking import metrics, trials
from trainer.tracking.progress import TrackingProgress

ODD = [None, True, -1, 1e300, "text", "NaN", [], [1], {}, {"a": {"b": []}}, 10**30]
GOOD = {
    "stage": {"name": "a", "seconds": 1.0},
    "start": {"name": "a", "workers": 2},
    "accepted": {"changes": ["a"]},
    "rewind": {"step": 0},
    "restart": {"reason": "a", "trace": "b"},
    "resized": {"workers": 2, "reason": "a"},
    "step": {
        "step": 1,
        "examples": 8,
        "fresh": 8,
        "loss": 0.5,
        "learning_rate": 0.1,
        "batch": 8,
        "step_s": 1.0,
        "echo": {"age": 1.0},
        "wait_s": 0.1,
    },
    "evaluation": {"split": "test", "step": 1, "examples": 8, "metrics": {"loss": 0.5}},
    "checkpoint": {"step": 1, "examples": 8, "path": "x"},
    "decision": {"position": 4, "what": "rate_factor", "value": 0.5},
    "execution": {"step": 1, "reason": "a"},
    "target": {"metric": "loss", "value": 0.1, "step": 1, "examples": 8, "fresh": 8, "seconds": 1.0},
    "sweep": {
        "name": "a",
        "target": {"metric": "loss", "at_most": 0.2},
        "arms": ["a"],
        "batches": [4],
        "recipes": {"a": {"track": {}}},
    },
    "trial": {
        "key": "a",
        "arm": "a",
        "batch": 4,
        "axes": {},
        "rate": 0.1,
        "seed": 0,
        "stage": "search",
        "end": "reached",
        "steps": 1.5,
        "trained_steps": 2,
        "examples": 8,
        "seconds": 0.1,
        "curve": [[1, 0.5], [2, 0.1]],
        "test": {"loss": 0.5},
        "noise_scale": None,
    },
    "best": {"arm": "a", "batch": 4, "axes": {}, "rate": 0.1},
    "fit": {"arm": "a", "axes": {}, "metrics": {"b_crit": 40.0}},
    "stop": {"step": 1, "examples": 8, "reason": "a"},
    "end": {"status": "FINISHED", "reason": None, "metrics": {"loss": 0.5}},
    "forecast": {
        "id": "a",
        "run": "a",
        "arm": "a",
        "batch": 8,
        "axes": {"echo.factor": 2},
        "rate": 0.1,
        "steps": {"batch": 8, "low": 1.0, "median": 2.0, "high": 3.0, "level": 0.8},
        "seconds": None,
    },
}


def write(folder: Path, *lines: object) -> None:
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / layout.JOURNAL).write_text(text)


def read_everywhere(folder: Path) -> None:
    """All that reads a journal does."""
    runs.Summary.of(folder).row()
    runs.SweepSummary.of(folder).row()
    lines = list(journal.read(folder))
    trials.of_the_sweep(lines)
    trials.mean_steps(lines)
    trials.table(lines)
    for line in lines:
        if line["kind"] == "trial":
            trials.title(line, GOOD["sweep"])
            trials.metrics(line, GOOD["sweep"])
    Outcome.read(folder)
    Decisions.of(journal.read(folder))
    promises(folder)
    metrics.entry(journal.read(folder), TrackingProgress(""))
    console = Console(io.StringIO())
    with console.following(folder, 0, 100):
        pass
    assert "Traceback" not in console.rich.file.getvalue()


def odd_lines() -> list[dict]:
    found = []
    for kind, fields in GOOD.items():
        line = {"kind": kind, "time": 1.7e9, **fields}
        found += [{key: value for key, value in line.items() if key != name} for name in line]
        found += [line | {name: odd} for name in line for odd in ODD]
    return found


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_written_today_is_sound(kind):
    assert wrong_with({"kind": kind, "time": 1.7e9, **GOOD[kind]}) is None
    assert FIELDS.keys() <= GOOD.keys()


def test_no_line_that_lacks_something_or_holds_odd_things_is_anybodys_traceback(tmp_path):
    began, ended = {"kind": "rewind", "time": 1.0, "step": 0}, {"kind": "end", "time": 2, "status": "FAILED"}
    write(tmp_path, began, *odd_lines(), ended)
    read_everywhere(tmp_path)
    for line in odd_lines():
        write(tmp_path, began, line, ended)
        runs.Summary.of(tmp_path).row()
        metrics.entry(journal.read(tmp_path), TrackingProgress(""))
        assert Outcome.read(tmp_path).status == "FAILED"


@pytest.mark.parametrize(
    "odd", ["[]\n", "3\n", "null\n", '"x"\n', "{}\n", "\x00\n", "[" * 5000 + "\n", '{"kind":\n']
)
def test_what_is_no_line_is_left_out(tmp_path, odd):
    write(tmp_path, odd, "\n", {"kind": "rewind", "time": 1.0, "step": 0})
    read_everywhere(tmp_path)
    assert [line["kind"] for line in journal.read(tmp_path)] == ["rewind"]


def test_a_word_is_said_of_what_is_left_out(tmp_path, caplog):
    write(tmp_path, {"kind": "end", "time": 1.0, "status": "FIN"})
    with caplog.at_level(logging.WARNING):
        assert Outcome.read(tmp_path) is None
    assert "is of kind end, and its status is 'FIN', and is left out" in caplog.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["kind", "time", "step", "metrics", "status", "examples"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
            ),
        ),
    )
)
def test_any_json_object_may_stand_in_a_journal(tmp_path, line):
    write(tmp_path, line)
    read_everywhere(tmp_path)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{",
        '{"metrics": 3}',
        '{"metrics": {"loss": "x"}, "format": []}',
        "[" * 5000,
        '{"sha256": {}}',
    ],
)
def test_odd_manifests_and_odd_files_among_checkpoints_are_passed_over(tmp_path, manifest):
    store = Checkpoints(tmp_path / "checkpoints", keep=2, best=Best(metric="loss", mode="min"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    store.folder.mkdir()
    (store.folder / "step-00000001").mkdir()
    (store.folder / "step-00000001/manifest.json").write_text(manifest)
    (store.folder / "step-99999999").write_text("a file")
    (store.folder / "step-00000009").symlink_to(outside)
    (store.folder / "step-00000002").mkdir()
    (store.folder / "step-00000002/manifest.json").mkdir()
    store.is_among_best({"loss": 1.0})
    for step in (3, 4, 5):
        store.save(step, {"w": torch.ones(1)}, metrics={"loss": 1.0 / step})
        store.wait()
    assert store.newest_whole().name == "step-00000005"
    assert (outside / "kept").exists()
    assert (store.folder / "step-00000009").is_symlink()
    assert "goes on from step 5" in how_to_go_on(tmp_path, "x")


def test_prune_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    for place in ("big", "checkpoints/step-00000001"):
        (outside / place).mkdir(parents=True)
        (outside / place / "kept").write_text("x" * 100)
    for name in ("a-001", "a-002"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write(tmp_path / "runs" / name, {"kind": "end", "time": 1, "status": "FINISHED"})
    (tmp_path / "runs/a-001/checkpoints").symlink_to(outside / "checkpoints")
    (tmp_path / "runs/a-002/checkpoints").mkdir()
    (tmp_path / "runs/a-002/checkpoints/step-00000001").symlink_to(outside / "big")
    said = runs.prune(str(tmp_path / "runs"), [])
    assert "a-001: its checkpoints are behind a link, and were left" in said
    assert "a-002: 0.0 MB of checkpoints removed" in said
    assert len(list(outside.rglob("kept"))) == 2

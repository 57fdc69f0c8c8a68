"""The journal: what is written is read, no matter what dies, and any JSON reader can read it."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.run_folder import journal as journal_module
from trainer.run_folder.journal import Journal, Tail, follow, read
from trainer.run_folder.layout import JOURNAL


@pytest.fixture(autouse=True)
def the_format_alone(monkeypatch):
    """Any fields do for the format; what each kind needs is tested in test_journal_lines.py."""
    monkeypatch.setattr(
        journal_module, "wrong_with", lambda line: None if isinstance(line, dict) else "is odd"
    )
    monkeypatch.setattr(journal_module, "completed", lambda line: line)


RESERVED = {"NaN", "Infinity", "-Infinity"}
texts = st.text().filter(lambda text: text not in RESERVED)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(texts.filter(lambda key: key not in {"kind", "time"}), values, max_size=4)


def contents(lines) -> str:
    """A comparable text (NaN equals NaN in it) of lines without their times."""
    return repr([{key: value for key, value in line.items() if key != "time"} for line in lines])


@given(lines=st.lists(fields, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("run")
    journal = Journal(folder)
    for line in lines:
        journal.write("step", **line)
    journal.close()
    assert contents(read(folder)) == contents({"kind": "step", **line} for line in lines)


@given(value=values)
def test_a_strict_json_reader_copes(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("run")
    journal = Journal(folder)
    journal.write("step", value=value)
    journal.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in (folder / JOURNAL).read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["kind"] == "step"


def test_numbers_of_numpy_and_torch(tmp_path):
    journal = Journal(tmp_path)
    journal.write(
        "step", loss=np.float32(0.5), norm=torch.tensor(math.inf), counts=np.arange(3), path=tmp_path
    )
    journal.close()
    (line,) = read(tmp_path)
    assert (line["loss"], line["norm"], line["counts"], line["path"]) == (
        0.5,
        math.inf,
        [0, 1, 2],
        str(tmp_path),
    )


def test_what_cannot_be_written_is_refused_and_leaves_the_file_whole(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(TypeError, match="object"):
        journal.write("step", thing=object())
    journal.write("end", status="FINISHED")
    journal.close()
    assert [line["kind"] for line in read(tmp_path)] == ["end"]


@given(cut=st.integers(min_value=1, max_value=60))
def test_half_a_last_line_is_no_line_and_the_next_writer_starts_afresh(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("run")
    journal = Journal(folder)
    journal.write("stage", name="first")
    journal.write("stage", name="second", seconds=1.25, note="long enough to be cut anywhere in it")
    journal.close()
    os.truncate(folder / JOURNAL, (folder / JOURNAL).stat().st_size - cut)
    assert [line["name"] for line in read(folder)] == ["first"]
    later = Journal(folder)
    later.write("stage", name="third")
    later.close()
    names = [line["name"] for line in read(folder)]
    # Only the line's end was lost when one byte was cut: then the line itself is still there.
    assert names == (["first", "second", "third"] if cut == 1 else ["first", "third"])


def test_tail_gives_each_line_once_and_waits_for_the_end_of_a_line(tmp_path):
    tail = Tail(tmp_path)
    assert tail.lines() == []
    with open(tmp_path / JOURNAL, "ab", buffering=0) as file:
        file.write(b'{"kind":"stage","name":"a"}\n{"kind":"sta')
        assert [line["name"] for line in tail.lines()] == ["a"]
        assert tail.lines() == []
        file.write(b'ge","name":"b"}\n')
    assert [line["name"] for line in tail.lines()] == ["b"]
    assert Tail(tmp_path, tail.offset).lines() == []


def test_steps_are_gathered_and_everything_else_goes_out_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.run_folder.journal.FLUSH_INTERVAL_S", math.inf)
    journal = Journal(tmp_path)
    journal.write("stage", name="ready")
    journal.write("step", step=1)
    assert [line["kind"] for line in read(tmp_path)] == ["stage"]
    journal.write("checkpoint", step=1)
    assert [line["kind"] for line in read(tmp_path)] == ["stage", "step", "checkpoint"]
    journal.close()


def test_follow_sees_lines_as_they_come_and_drains_the_file_after_stop(tmp_path):
    seen: list[int] = []
    half_way, finished = threading.Event(), threading.Event()

    def watch():
        for line in follow(tmp_path, finished.is_set):
            seen.append(line["number"])
            if line["number"] == 9:
                half_way.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    journal = Journal(tmp_path)
    for number in range(10):
        journal.write("stage", number=number)
    assert half_way.wait(10)
    for number in range(10, 20):
        journal.write("step", number=number)
    journal.close()
    finished.set()
    watcher.join(10)
    assert seen == list(range(20))


def test_steps_go_out_when_their_time_has_come(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.run_folder.journal.FLUSH_INTERVAL_S", 0.0)
    journal = Journal(tmp_path)
    journal.write("step", step=1)
    assert [line["kind"] for line in read(tmp_path)] == ["step"]
    journal.close()


def test_a_decision_is_synced_before_the_call_returns(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / JOURNAL).read_bytes()))
    journal.decide(96, "echo factor", 1.5)
    assert len(synced) == 1
    line = json.loads(synced[0])
    assert (line["kind"], line["position"], line["what"], line["value"]) == (
        "decision",
        96,
        "echo factor",
        1.5,
    )
    journal.close()


WRITER = """
import sys
from trainer.run_folder.journal import Journal
journal = Journal(sys.argv[1])
for number in range(200):
    journal.write(sys.argv[2], writer=int(sys.argv[3]), number=number, filler="x" * 200)
"""


def start_writer(folder: Path, kind: str, writer: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), kind, str(writer)])


def test_two_processes_append_whole_lines_and_the_end_of_a_process_flushes(tmp_path):
    writers = [start_writer(tmp_path, kind, number) for number, kind in enumerate(["stage", "step"])]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = list(read(tmp_path))
    for number in range(2):
        assert [line["number"] for line in lines if line["writer"] == number] == list(range(200))


def test_a_killed_process_loses_no_decision(tmp_path):
    code = "import sys, os, signal; from trainer.run_folder.journal import Journal;"
    code += " journal = Journal(sys.argv[1]);"
    code += (
        "journal.write('step', step=1); journal.decide(8, 'stop', True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [line["kind"] for line in read(tmp_path)] == ["step", "decision"]

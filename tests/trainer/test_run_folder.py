"""Run folders: one per run, however many start at once."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer.errors import UserError
from trainer.run_folder import layout


def test_numbers_go_on_from_the_highest_of_the_name(tmp_path):
    for name in ("a-001", "a-007", "a-b-009", "a-12", "b-100"):
        (tmp_path / name).mkdir()
    (tmp_path / "a-400").touch()
    assert layout.create(tmp_path, "a").name == "a-008"
    assert layout.create(tmp_path, "a-b").name == "a-b-010"
    assert layout.newest(tmp_path, "a").name == "a-008"


def test_runs_that_start_at_once_get_one_each(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: layout.create(tmp_path / "runs", "a"), range(40)))
    assert sorted(path.name for path in folders) == [f"a-{n:03d}" for n in range(1, 41)]


def test_after_999_comes_1000(tmp_path):
    (tmp_path / "a-999").mkdir()
    assert layout.create(tmp_path, "a").name == "a-1000"
    assert layout.newest(tmp_path, "a").name == "a-1000"


def test_a_place_that_cannot_hold_runs_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"checkpoint\.dir: .*file/runs cannot hold runs"):
        layout.create(tmp_path / "file" / "runs", "a")


def test_a_claim_keeps_others_out_until_it_ends_even_by_death(tmp_path):
    refused = pytest.raises(UserError, match="another process")
    with layout.locked(tmp_path), refused, layout.locked(tmp_path):
        pass
    child = os.fork()
    if child == 0:
        with layout.locked(tmp_path):
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with layout.locked(tmp_path):
        pass

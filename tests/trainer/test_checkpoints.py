"""A checkpoint is whole or passed over."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from trainer.errors import RunFailed
from trainer.recipe.checkpoint import Best
from trainer.run_folder.checkpoints import Checkpoints, load


def state(value: float) -> dict:
    return {"progress": {"step": 1}, "model": {"w": torch.full((50,), value)}, "note": [1, "two", None]}


def save(store: Checkpoints, step: int, value: float) -> Path:
    path = store.save(step, state(value))
    store.wait()
    return path


def test_what_is_saved_is_loaded(tmp_path: Path):
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    path = save(store, 7, 3.0)
    loaded = load(path)
    assert torch.equal(loaded["model"].pop("w"), torch.full((50,), 3.0))
    assert loaded == {"progress": {"step": 1}, "model": {}, "note": [1, "two", None]}


def test_the_copy_is_taken_when_save_is_called(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=2)
    weights = torch.ones(1 << 20)
    path = store.save(1, {"w": weights})
    weights.zero_()
    store.wait()
    assert load(path)["w"].eq(1).all()


def test_the_newest_are_kept(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10):
        save(store, step, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert store.newest_whole() == tmp_path / "step-00000010"


@pytest.mark.parametrize(("mode", "kept"), [("max", {2, 5, 7, 8}), ("min", {1, 6, 7, 8})])
def test_the_best_are_kept_beside_the_newest(tmp_path: Path, mode: str, kept: set[int]):
    store = Checkpoints(tmp_path, keep=2, best=Best(metric="accuracy", mode=mode, keep=2))
    worth = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.4, 5: 0.8, 6: 0.1}
    for step, accuracy in worth.items():
        if step == 6:
            assert store.is_among_best({"accuracy": 0.05 if mode == "min" else 0.95})
            assert not store.is_among_best({"accuracy": 0.5})
            assert not store.is_among_best({"accuracy": float("nan")})
        store.save(step, state(1.0), metrics={"accuracy": accuracy})
        store.wait()
    for step in (7, 8):  # saved between evaluations: nothing is known of them
        store.save(step, state(1.0), metrics={})
        store.wait()
    assert {int(path.name[5:]) for path in tmp_path.iterdir()} == kept
    with pytest.raises(RunFailed, match="has no metric accuracy; it has loss"):
        store.is_among_best({"loss": 1.0})


def test_a_checkpoint_cut_at_any_byte_is_never_chosen(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=5)
    older, newer = save(store, 1, 1.0), save(store, 2, 2.0)
    whole = (newer / "state.pt").read_bytes()
    for cut in range(0, len(whole), 97):
        (newer / "state.pt").write_bytes(whole[:cut])
        assert store.newest_whole() == older
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (newer / "state.pt").write_bytes(bytes(flipped))
    assert store.newest_whole() == older
    with pytest.raises(RunFailed, match="damaged or incomplete"):
        load(newer)
    (newer / "state.pt").write_bytes(whole)
    assert store.newest_whole() == newer


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"format": 1}', None])
def test_a_checkpoint_without_its_manifest_is_never_chosen(tmp_path: Path, manifest: str | None):
    store = Checkpoints(tmp_path, keep=5)
    path = save(store, 1, 1.0)
    (path / "manifest.json").unlink()
    if manifest is not None:
        (path / "manifest.json").write_text(manifest)
    assert store.newest_whole() is None


def test_what_a_dead_writer_left_is_written_over(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=5)
    whole = save(store, 1, 1.0)
    shutil.copytree(whole, tmp_path / ".writing-step-00000002")
    assert store.newest_whole() == whole
    assert save(store, 2, 2.0) == store.newest_whole()


def test_a_failed_write_is_told(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("in the way")
    store = Checkpoints(tmp_path / "checkpoints", keep=1)
    store.save(1, state(1.0))
    with pytest.raises(RunFailed, match="could not be written"):
        store.wait()


def test_nothing_but_tensors_and_plain_values_is_unpickled(tmp_path: Path):
    store = Checkpoints(tmp_path, keep=1)
    path = store.save(1, {"bad": Path("a pickled class")})
    store.wait()
    assert json.loads((path / "manifest.json").read_text())["format"] == 1
    with pytest.raises(Exception, match="weights_only"):
        load(path)

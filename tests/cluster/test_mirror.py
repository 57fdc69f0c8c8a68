"""A run's copy at another address: what is there is whole, and enough to go on from."""

import errno
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster import mirror
from cluster.console import Console
from cluster.mirror import Mirror
from trainer.errors import UserError
from trainer.run_folder.checkpoints import Checkpoints, load
from trainer.run_folder.journal import Journal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path / "here" / "tiny-001"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: tiny\n")
    save(folder, 1)
    save(folder, 2)
    write(folder, "start")
    return folder


def save(folder: Path, step: int, keep: int = 2) -> None:
    store = Checkpoints(folder / "checkpoints", keep)
    store.save(step, {"w": torch.full((3,), float(step))})
    store.wait()


def write(folder: Path, kind: str) -> None:
    journal = Journal(folder)
    journal.write(kind)
    journal.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("address", [lambda path: str(path), lambda path: f"local://{path}"])
def test_the_copy_follows_the_run(tmp_path: Path, folder: Path, address: Callable[[Path], str]):
    copy = Mirror(address(tmp_path / "there"), folder)
    copy.push()
    assert contents(tmp_path / "there/tiny-001") == contents(folder)
    save(folder, 3)
    write(folder, "end")
    copy.push()
    assert contents(tmp_path / "there/tiny-001") == contents(folder)
    assert "checkpoints/step-00000001/state.pt" not in contents(tmp_path / "there/tiny-001")


def test_a_checkpoint_that_is_pruned_while_it_is_copied_arrives_whole_and_then_goes(
    tmp_path: Path, folder: Path, monkeypatch
):
    copy = Mirror(str(tmp_path / "there"), folder)
    put, states = copy.filesystem.put_file, []

    def put_and_prune(source: str, target: str) -> None:
        if source.endswith("state.pt") and len(states) < 3:
            save(folder, 3 + len(states), keep=1)
        put(source, target)
        if source.endswith("state.pt"):
            states.append(target.split("/")[-2])

    monkeypatch.setattr(copy.filesystem, "put_file", put_and_prune)
    copy.push()
    assert states == [f"step-{step:08d}" for step in (2, 3, 4, 5)]
    assert contents(tmp_path / "there/tiny-001") == contents(folder)


@pytest.mark.parametrize("links", [True, False])
def test_a_mirror_slower_than_the_checkpoints_always_holds_a_whole_one(
    tmp_path: Path, folder: Path, monkeypatch, links: bool
):
    """However far the run is ahead, the copier skips to the newest, and its machine may go at any time."""
    monkeypatch.setattr(mirror, "PAUSE_S", 0.01)
    if not links:
        monkeypatch.setattr(mirror.os, "link", unsupported)
    slow, lost = tmp_path / "there", []

    class Slow(Mirror):
        def __init__(self, address, folder):
            super().__init__(address, folder)
            put = self.filesystem.put_file

            def put_slowly(source: str, target: str) -> None:
                for step in range(20 * len(lost), 20 * len(lost) + 20) if source.endswith("state.pt") else ():
                    save(folder, 100 + step, keep=3)
                put(source, target)
                manifests = list((slow / "tiny-001/checkpoints").glob("*/manifest.json"))
                lost.append(target)
                if len(lost) > 8:
                    assert manifests
                for manifest in manifests:
                    load(manifest.parent)
                if len(lost) > 40:
                    raise ConnectionError("the machine is gone")

            monkeypatch.setattr(self.filesystem, "put_file", put_slowly)

    with pytest.raises(ConnectionError):
        Slow(str(slow), folder).push()
    whole = Checkpoints(slow / "tiny-001/checkpoints", 3).newest_whole()
    assert whole is not None
    states = [target for target in lost if target.endswith("state.pt")]
    assert len(states) <= 20  # of some hundred that were made
    assert whole.name == states[-1].split("/")[-2] or whole.name == states[-2].split("/")[-2]


def unsupported(*_: object) -> None:
    raise OSError(errno.ENOTSUP, "no hard links here")


def test_a_step_that_was_saved_again_is_brought_again(tmp_path: Path, folder: Path):
    Mirror(str(tmp_path / "there"), folder).push()
    store = Checkpoints(folder / "checkpoints", 2)
    store.save(2, {"w": torch.zeros(3)})
    store.wait()
    Mirror(str(tmp_path / "there"), folder).push()
    assert contents(tmp_path / "there/tiny-001") == contents(folder)


def test_an_upload_cut_anywhere_leaves_no_checkpoint_that_is_not_whole(tmp_path: Path, folder: Path):
    """However many of a push's writes and removals are done, every manifest there has its state."""
    Mirror(str(tmp_path / "there"), folder).push()
    save(folder, 3)
    most = 0
    for allowed in range(100):
        there = tmp_path / f"cut-{allowed}"
        shutil.copytree(tmp_path / "there", there)
        copy = Mirror(str(there), folder)
        left = [allowed]

        def counted(action, left=left):
            def act(*arguments):
                if not left[0]:
                    raise ConnectionError("cut")
                left[0] -= 1
                return action(*arguments)

            return act

        copy.filesystem = Proxy(copy.filesystem, counted)
        try:
            copy.push()
        except ConnectionError:
            most = allowed
        manifests = list((there / "tiny-001/checkpoints").glob("*/manifest.json"))
        assert len(manifests) >= 1
        for manifest in manifests:
            load(manifest.parent)
        if most < allowed:
            break
    assert most >= 4


class Proxy:
    """A file system whose writes and removals go through `guard`."""

    def __init__(self, inner, guard):
        self.inner, self.guard = inner, guard

    def __getattr__(self, name):
        found = getattr(self.inner, name)
        return self.guard(found) if name in ("put_file", "rm_file") else found


def test_another_runs_copy_is_left_alone(tmp_path: Path, folder: Path):
    Mirror(str(tmp_path / "there"), folder).push()
    before = contents(tmp_path / "there")
    (folder / "journal.jsonl").write_text('{"kind": "start", "time": 5}\n')
    with pytest.raises(UserError, match="is another run's"):
        Mirror(str(tmp_path / "there"), folder).push()
    assert contents(tmp_path / "there") == before


def test_a_machine_without_the_run_gets_it(tmp_path: Path, folder: Path):
    Mirror(str(tmp_path / "there"), folder).push()
    elsewhere = tmp_path / "elsewhere"
    mirror.fetch(str(tmp_path / "there"), elsewhere, "tiny")
    assert Checkpoints(elsewhere / "tiny-001/checkpoints", 2).newest_whole().name == "step-00000002"
    assert (elsewhere / "tiny-001/journal.jsonl").read_bytes() == (folder / "journal.jsonl").read_bytes()


def test_a_newest_copy_that_is_damaged_is_passed_over(tmp_path: Path, folder: Path):
    Mirror(str(tmp_path / "there"), folder).push()
    state = tmp_path / "there/tiny-001/checkpoints/step-00000002/state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    mirror.fetch(str(tmp_path / "there"), tmp_path / "elsewhere", "tiny")
    whole = Checkpoints(tmp_path / "elsewhere/tiny-001/checkpoints", 2).newest_whole()
    assert whole.name == "step-00000001"


def test_what_went_on_elsewhere_comes_back_and_what_went_on_here_stays(tmp_path: Path, folder: Path):
    there, elsewhere = str(tmp_path / "there"), tmp_path / "elsewhere"
    Mirror(there, folder).push()
    mirror.fetch(there, elsewhere, "tiny")
    save(elsewhere / "tiny-001", 9)
    write(elsewhere / "tiny-001", "rewind")
    Mirror(there, elsewhere / "tiny-001").push()

    mirror.fetch(there, folder.parent, "tiny")
    assert Checkpoints(folder / "checkpoints", 2).newest_whole().name == "step-00000009"
    write(folder, "rewind")  # only here
    before = contents(folder)
    mirror.fetch(there, folder.parent, "tiny")
    assert contents(folder) == before
    write(elsewhere / "tiny-001", "end")  # only there
    Mirror(there, elsewhere / "tiny-001").push()
    with pytest.raises(UserError, match="went different ways"):
        mirror.fetch(there, folder.parent, "tiny")


def test_a_new_run_takes_a_number_that_no_copy_has(tmp_path: Path, folder: Path):
    assert mirror.highest(str(tmp_path / "there"), "tiny") == 0
    Mirror(str(tmp_path / "there"), folder).push()
    assert mirror.highest(str(tmp_path / "there"), "tiny") == 1
    assert mirror.highest(str(tmp_path / "there"), "other") == 0
    assert mirror.highest(None, "tiny") == 0


def test_an_address_that_cannot_be_reached_is_no_reason_not_to_begin_or_to_go_on(folder: Path, monkeypatch):
    class Unreachable:
        def exists(self, path):
            raise RuntimeError("no credentials")  # drivers have errors of their own

    monkeypatch.setattr(mirror, "_open", lambda address: (Unreachable(), "bucket"))
    assert mirror.highest("s3://bucket", "tiny") == 0
    mirror.fetch("s3://bucket", folder.parent, "tiny")
    with pytest.raises(UserError, match="raised RuntimeError: no credentials; try again"):
        mirror.fetch("s3://bucket", folder.parent / "elsewhere", "tiny")


def test_an_address_that_nothing_can_open_is_refused(folder: Path):
    with pytest.raises(UserError, match=r"checkpoint.mirror: nowhere://x cannot be opened"):
        Mirror("nowhere://x", folder)
    with pytest.raises(UserError, match=r"checkpoint.mirror: nowhere://x cannot be opened"):
        mirror.highest("nowhere://x", "tiny")


def test_a_mirror_that_fails_falls_behind_and_says_so(tmp_path: Path, folder: Path, monkeypatch):
    monkeypatch.setattr(mirror, "PAUSE_S", 0.01)
    (tmp_path / "there").write_text("a file where a folder should be")
    shown = io.StringIO()
    with mirror.mirroring(str(tmp_path / "there"), folder, Console(shown)):
        pass
    assert "the mirror is behind (" in shown.getvalue()
    assert "lockstep sync" in shown.getvalue()
    (tmp_path / "there").unlink()
    with mirror.mirroring(str(tmp_path / "there"), folder, Console(shown)):
        save(folder, 3)
    assert contents(tmp_path / "there/tiny-001") == contents(folder)
    assert f"mirror: file://{tmp_path}/there/tiny-001" in shown.getvalue()

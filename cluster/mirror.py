"""A copy of a run's checkpoints, recipe and journal at an fsspec address, for when its machine is gone.

A thread of the driver's keeps the copy up to date, as an onlooker of the run's folder: an address that cannot
be reached only makes the copy fall behind. A checkpoint's manifest goes last and leaves first, so that one
that is there is whole; the journal goes before it, with every decision that the checkpoint rests on.

A copier that is slower than the checkpoints always takes the newest next, from hard links of its own: what is
being copied may be pruned meanwhile. Older ones leave only after a newer one is whole there.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from cluster.console import Console
from cluster.signals import left_s
from trainer.errors import UserError, first_line
from trainer.run_folder import layout
from trainer.run_folder.layout import CHECKPOINTS, JOURNAL, MANIFEST, STATE

# What goes with the checkpoints
FILES = (layout.RECIPE, layout.PLAN, layout.TRACKING, layout.MODEL, JOURNAL)
PAUSE_S = 1.0  # between looks at the run's folder
PAUSE_AFTER_FAILURE_S = 10.0
ENDING_S = 120.0  # what the last upload may take


class Mirror:
    """The copy of one run. `address` is what `checkpoint.mirror` says, `folder` the run's."""

    def __init__(self, address: str, folder: Path) -> None:
        self.filesystem, root = _open(address)
        self.folder, self.root = folder, f"{root.rstrip('/')}/{folder.name}"
        self._sent: dict[str, tuple[int, int]] = {}  # which version of each file this mirror has sent
        self.place = self.filesystem.unstrip_protocol(self.root)

    def push(self) -> None:
        """Bring there what it has not got, and remove the checkpoints that are no longer kept here.

        Raises:
            UserError: another run lies there.
            Exception: what a file system raises that cannot be reached.
        """
        self._refuse_another_run()
        while (newest := self._newest_missing()) is not None:
            name, told = newest
            with self._held(name, told) as held:
                if held is None:
                    continue  # it was replaced or pruned in this moment
                self._remove(name)
                self._put(f"{CHECKPOINTS}/{name}/{STATE}", held / STATE)
                self._put_files()
                self._put(f"{CHECKPOINTS}/{name}/{MANIFEST}", held / MANIFEST)
            self._remove_old()
        self._put_files()
        self._remove_old()

    def _newest_missing(self) -> tuple[str, bytes] | None:
        """The newest checkpoint that is not there, with its manifest."""
        there, here = self._checkpoints(), _manifests(self.folder)
        return max((item for item in here.items() if there.get(item[0]) != item[1]), default=None)

    def _remove_old(self) -> None:
        """Remove there what is no longer kept here, once something of what is kept is whole there."""
        there, here = self._checkpoints(), _manifests(self.folder)
        if any(there.get(name) == told for name, told in here.items()):
            for name in there.keys() - here.keys():
                self._remove(name)

    @contextmanager
    def _held(self, name: str, told: bytes) -> Iterator[Path | None]:
        """A folder of hard links to a checkpoint's files (copies, where the file system has no links), which
        nobody else removes; None where it is no longer what its manifest `told`.
        """
        source = self.folder / CHECKPOINTS / name
        held = source.with_name(f"{layout.MIRRORING}{name}")
        shutil.rmtree(held, ignore_errors=True)
        held.mkdir()
        try:
            for file in (STATE, MANIFEST):
                _link(source / file, held / file)
            is_same = (held / MANIFEST).read_bytes() == told
        except FileNotFoundError:
            is_same = False
        try:
            yield held if is_same else None
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def pull(self) -> None:
        """Bring here what a resumed run needs: its small files, and the newest whole checkpoint."""
        from trainer.run_folder.checkpoints import is_whole

        self.folder.mkdir(parents=True, exist_ok=True)
        whole = [name for name, told in self._checkpoints().items() if told]
        for name in sorted(whole, reverse=True):
            target = self.folder / CHECKPOINTS / name
            partial = target.with_name(f"{layout.FETCHING}{name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for file in (STATE, MANIFEST):
                self.filesystem.get_file(f"{self.root}/{CHECKPOINTS}/{name}/{file}", str(partial / file))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            if is_whole(target):
                break
        for name in FILES:  # the journal last: until it is here, this is no run
            if self.filesystem.exists(f"{self.root}/{name}"):
                self.filesystem.get_file(f"{self.root}/{name}", str(self.folder / name))

    def journal(self) -> bytes:
        """The copied journal; empty where there is none."""
        path = f"{self.root}/{JOURNAL}"
        return self.filesystem.cat_file(path) if self.filesystem.exists(path) else b""

    def _refuse_another_run(self) -> None:
        ours, path = (self.folder / JOURNAL).read_bytes(), f"{self.root}/{JOURNAL}"
        if self.filesystem.exists(path):
            first = self.filesystem.cat_file(path, start=0, end=ours.find(b"\n") + 1)
            if not ours.startswith(first):
                raise UserError(f"{path}: is another run's; remove or rename it, or change checkpoint.mirror")

    def _checkpoints(self) -> dict[str, bytes]:
        """All by name, each with its manifest: an empty one where that never came."""
        self.filesystem.invalidate_cache()
        pattern = f"{self.root}/{CHECKPOINTS}/{layout.ANY_CHECKPOINT}/*"
        found = [str(path) for path in self.filesystem.glob(pattern)]
        whole = {path.split("/")[-2]: path for path in found if path.endswith(f"/{MANIFEST}")}
        names = {path.split("/")[-2] for path in found}
        return {name: self.filesystem.cat_file(whole[name]) if name in whole else b"" for name in names}

    def _put_files(self) -> None:
        """Bring the small files there, and the model, each unless it is there as it is now."""
        for name in FILES:
            try:
                found = (self.folder / name).stat()
            except FileNotFoundError:
                continue
            version = found.st_mtime_ns, found.st_size
            if self._sent.get(name) != version:
                self._put(name, self.folder / name)
                self._sent[name] = version

    def _put(self, name: str, source: Path) -> None:
        target = f"{self.root}/{name}"
        self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.filesystem.put_file(str(source), target)

    def _remove(self, name: str) -> None:
        for file in (MANIFEST, STATE):
            path = f"{self.root}/{CHECKPOINTS}/{name}/{file}"
            if self.filesystem.exists(path):
                self.filesystem.rm_file(path)


@contextmanager
def mirroring(address: str | None, folder: Path, console: Console) -> Iterator[None]:
    """Keep a mirror up to date while the body trains, and once more at the end; nothing to do without one."""
    if address is None:
        yield
        return
    pusher = _Pusher(Mirror(address, folder), console)
    pusher.start()
    ending_s = ENDING_S
    try:
        yield
    except KeyboardInterrupt as interrupt:
        ending_s = left_s(interrupt, ENDING_S)
        raise
    finally:
        pusher.over.set()
        with console.waiting("bringing the rest to the mirror"):
            pusher.join(ending_s)
        reason = "it takes long" if pusher.is_alive() else pusher.failure
        if reason:
            later = f"`lockstep sync {layout.relative_to_cwd(folder)}` brings the rest there later"
            console.say(f"the mirror is behind ({reason}); {later}")
        else:
            console.say(f"mirror: {pusher.mirror.place}")


def highest(address: str | None, name: str) -> int:
    """The highest number of the copied runs of a name; 0 where there are none or nobody knows."""
    try:
        return max(_numbers(address, name), default=0) if address else 0
    except UserError:
        raise
    except Exception:  # what its driver raises where it cannot be reached
        return 0


def fetch(address: str, directory: Path, name: str) -> None:
    """Bring the newest run of a name here from its mirror, where the folder here is missing or older.

    Raises:
        UserError: the run here and its mirror went different ways, or neither can be had.
    """
    numbers = [number for number, _ in layout.numbered(directory.absolute(), name)]
    try:
        copied = _numbers(address, name)
    except Exception as error:  # what its driver raises where it cannot be reached
        if numbers:
            return  # the run here is what there is to resume
        raise UserError(
            f"--resume: {directory} holds no run of {name}, and its mirror {address} raised "
            f"{type(error).__name__}: {error}; try again when it can be reached"
        ) from error
    newest = max(copied, default=0)
    if newest < max(numbers, default=1):
        return
    folder = directory.absolute() / f"{name}-{newest:03d}"
    mirror = Mirror(address, folder)
    here = (folder / JOURNAL).read_bytes() if (folder / JOURNAL).exists() else b""
    there = mirror.journal()
    if there.startswith(here) and there != here:
        mirror.pull()
    elif not here.startswith(there):
        raise UserError(
            f"--resume: {layout.relative_to_cwd(folder)} and its mirror {mirror.place} went different "
            "ways; rename the one that is not to be resumed"
        )


def _open(address: str) -> tuple[Any, str]:
    """The file system and the folder of an address; UserError where this machine has no driver for it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"checkpoint.mirror: {address} cannot be opened ({error}); give a folder or an fsspec address"
        ) from error


class _Pusher(Thread):
    """Pushes whenever other checkpoints are kept, and once more when it is `over`."""

    def __init__(self, mirror: Mirror, console: Console) -> None:
        super().__init__(name="mirror", daemon=True)
        self.mirror, self.console, self.over = mirror, console, Event()
        self.failure: str | None = None  # what keeps the mirror from being up to date

    def run(self) -> None:
        seen: dict[str, bytes] = {}
        is_last = False
        while not is_last:
            is_last = self.over.wait(PAUSE_AFTER_FAILURE_S if self.failure else PAUSE_S)
            try:
                here = _manifests(self.mirror.folder)
                if here != seen or is_last:
                    self.mirror.push()
                seen, self.failure = here, None
            except Exception as error:  # the network's, the store's, of a checkpoint that was just removed
                before, self.failure = self.failure, first_line(error)
                if before is None and not is_last:
                    self.console.say(f"the mirror falls behind: {self.failure}")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def _manifests(folder: Path) -> dict[str, bytes]:
    found = (folder / CHECKPOINTS).glob(f"{layout.ANY_CHECKPOINT}/{MANIFEST}")
    return {path.parent.name: path.read_bytes() for path in found if path.is_file()}


def _numbers(address: str, name: str) -> list[int]:
    """The numbers of the copied runs of a name."""
    filesystem, root = _open(address)
    if not filesystem.exists(root):
        return []
    names = [str(path).rstrip("/").rpartition("/")[2] for path in filesystem.ls(root, detail=False)]
    parts = [name.rpartition("-") for name in names]
    return [int(number) for start, _, number in parts if start == name and number.isdigit()]

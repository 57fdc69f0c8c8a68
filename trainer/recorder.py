"""What rank 0 writes down of a run, in the run's folder: the journal, the checkpoints, the trained model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.compute.profiling import profiled
from trainer.distributed.group import WorkerGroup
from trainer.distributed.pulse import Pulse
from trainer.errors import RunFailed
from trainer.loop import Step
from trainer.plan.provenance import Provenance
from trainer.recipe.checkpoint import CheckpointSection
from trainer.run_folder import journal as journals
from trainer.run_folder import layout
from trainer.run_folder.checkpoints import Checkpoints, State, read
from trainer.run_folder.decisions import Decisions
from trainer.run_folder.journal import Journal
from trainer.run_folder.outcome import Outcome
from trainer.training import Training

LOOK_INTERVAL_S = 0.1  # between looks for a request to stop


class Recorder:
    """One run's folder. On other ranks than 0 nothing is written, and what is read comes from rank 0.

    Args:
        section: which checkpoints are kept.
        provenance: of code and data, kept with each checkpoint.
        profile: steps to profile; 0: none.
        pulse: moves with all that is written, for those who watch this worker.
    """

    def __init__(
        self,
        folder: Path,
        section: CheckpointSection,
        group: WorkerGroup,
        provenance: Provenance,
        profile: int = 0,
        pulse: Pulse | None = None,
    ):
        self.folder, self.group, self.provenance, self.profile = folder, group, provenance, profile
        self.checkpoints = Checkpoints(folder / layout.CHECKPOINTS, section.keep, section.best)
        self.journal = Journal(folder) if group.rank == 0 else None
        self.began_at = next((line["time"] for line in journals.read(folder)), time.time())
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.looked_at = 0.0
        self.pulse = pulse or Pulse()

    def write(self, kind: str, **fields: Any) -> None:
        """A line in the journal."""
        self.pulse.moved()
        if self.journal is not None:
            self.journal.write(kind, **fields)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note how long a phase of the start took."""
        started = time.monotonic()
        yield
        self.write("stage", name=name, seconds=time.monotonic() - started)

    def resume(self) -> tuple[State | None, Decisions]:
        """The newest whole checkpoint's state (None for a run that starts), and what was decided so far."""
        newest, decisions = None, Decisions()
        if self.group.rank == 0:
            self.checkpoints.wait()
            newest, decisions = self.checkpoints.newest_whole(), Decisions.of(journals.read(self.folder))
        newest, decisions = self.group.broadcast((newest, decisions))
        return (None if newest is None else read(newest)), decisions

    def stop_asked(self) -> bool:
        """Whether somebody asked for a stop, or waits to join, by a file in the run's folder; looked for now
        and then.
        """
        now = time.monotonic()
        if self.journal is None or now - self.looked_at < LOOK_INTERVAL_S:
            return False
        self.looked_at = now
        return (self.folder / layout.STOP).exists() or (self.folder / layout.REGROUP).exists()

    def stop_reason(self) -> str | None:
        """Why the run is to stop, as who asked for it has written it down; None where it is only to start
        again with more workers. Called by all of them.
        """
        reason: str | None = "interrupted"
        try:
            reason = (self.folder / layout.STOP).read_text()
        except OSError:
            if (self.folder / layout.REGROUP).exists():
                reason = None
        return self.group.broadcast(reason)

    def decide(self, position: int, what: str, value: Any) -> None:
        """Journal a decision that holds from a position of the data on; it is on the disk when this
        returns.
        """
        if self.journal is not None:
            self.journal.decide(position, what, value)

    def save(self, training: Training, metrics: dict[str, float] | None = None) -> None:
        """A checkpoint of where `training` stands, and the `metrics` measured there, written in the
        background.

        Weights that are not finite are not worth keeping: the next step notices them.
        """
        progress = training.progress
        self.saved_at = time.monotonic()
        if self.journal is None and not training.reduction.saves_together:
            return
        if self.saved_step == progress.step or not training.is_finite():
            return
        state, self.saved_step = training.state(), progress.step
        if self.journal is None:
            return
        path = self.checkpoints.save(progress.step, state, metrics=metrics or {}, **self.provenance)
        self.write("checkpoint", step=progress.step, examples=progress.examples, path=str(path))

    def profiled(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps, some of them under the profiler where that was asked for."""
        if self.journal is None or not self.profile:
            return steps
        return profiled(steps, self.profile, self.folder / layout.PROFILE)

    def export(self, training: Training) -> None:
        """The trained model, and its averaged weights in a file of their own, as safetensors."""
        models = {layout.MODEL: training.model}
        if training.average is not None:
            models[layout.AVERAGE] = training.average.model
        for name, model in models.items():
            weights = training.reduction.gathered(model.state_dict())
            if self.journal is not None:
                _export(weights, self.folder / name)

    def end(self, outcome: Outcome) -> Outcome:
        """Write how the run ended, and pass it on."""
        if self.journal is not None:
            outcome.write(self.journal)
        return outcome

    def close(self) -> None:
        """Wait for the last checkpoint, and close the journal."""
        self.checkpoints.wait()
        if self.journal is not None:
            self.journal.close()


def _export(weights: dict[str, Tensor], path: Path) -> None:
    tensors = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    # The format wants storage of its own for each tensor.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        save_file(own, path)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"{path}: the trained model could not be written: {error}") from error

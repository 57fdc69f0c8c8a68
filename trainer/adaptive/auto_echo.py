"""What echoing does in a run; and the automatic factor: measured on rank 0, decided in the journal, applied
by all workers at one position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_echo.echo_controller import FactorController
from trainer.run_folder.decisions import ECHO_FACTOR, Decided

if TYPE_CHECKING:
    from trainer.loop import Step
    from trainer.recorder import Recorder
    from trainer.training import Training

MEASURED_STEPS = 8  # between two looks at the speeds: each look is one small message between the workers


def counters(training: Training, step: Step) -> dict[str, float]:
    """What this worker's loader has done up to a step: see `EchoLoader.counters`.

    Beside them `factor`, the one in force; `downstream_s`, the step's seconds per served example without
    waiting; and `idle`, the share of its time that it waited for examples.
    """
    waited_s, step_s = step.seconds.get("wait", 0.0), sum(step.seconds.values())
    return {
        **training.loader.counters(),
        "factor": float(training.schedule.factor(training.progress.position - 1)),
        "downstream_s": (step_s - waited_s) / step.batch,
        "idle": waited_s / max(step_s, 1e-9),
    }


class AutomaticFactor:
    """Lets a run's echo factor follow the measured ratio of upstream to downstream time, up to `cap`.

    Nothing new is decided before the last of the decisions that were taken `before`: a replayed run is the
    run.
    """

    def __init__(self, cap: float, before: Decided):
        self.controller = FactorController(cap=cap)
        self.last_decision = max((position for position, _ in before), default=-1)
        self.busy_s, self.served = 0.0, 0  # of the steps since the last look
        self.worked_s, self.prepared = 0.0, 0.0  # of the pool, at the last look

    def after(self, step: Step, training: Training, record: Recorder) -> None:
        """Take a step's times in, and now and then decide."""
        self.busy_s += sum(step.seconds.values()) - step.seconds.get("wait", 0.0)
        self.served += step.batch
        position = training.progress.position
        if step.step % MEASURED_STEPS or position <= self.last_decision:
            return
        factor = training.group.broadcast(self._proposal(training) if training.group.rank == 0 else None)
        if factor is not None:
            record.decide(position, ECHO_FACTOR, factor)
            training.schedule.change(position, factor)

    def _proposal(self, training: Training) -> float | None:
        counters = training.loader.counters()
        worked_s, prepared = counters["work_s"] - self.worked_s, counters["prepared"] - self.prepared
        downstream_s = self.busy_s / self.served
        self.busy_s, self.served = 0.0, 0
        if not prepared:
            return None
        self.worked_s, self.prepared = counters["work_s"], counters["prepared"]
        upstream_s = worked_s / prepared / counters["processes"]
        now = float(training.schedule.factor(training.progress.position))
        return self.controller.propose(upstream_s, downstream_s, now)

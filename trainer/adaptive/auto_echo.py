"""The automatic echo factor: measured on rank 0, decided in the journal, applied by all workers at one
position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data_echo import FactorController, Schedule
from trainer.distributed.group import WorkerGroup
from trainer.run_folder.decisions import ECHO_FACTOR, Decided

MEASURED_STEPS = 8  # between two looks at the speeds: each look is one small message between the workers


class AutomaticFactor:
    """Lets a run's echo factor follow the measured ratio of upstream to downstream time, up to `cap`.

    Nothing new is decided before the last of the decisions that were taken `before`: a replayed run is the
    run.

    Args:
        schedule: whose factor changes.
        decide: journals a decision (position, what, value) durably.
    """

    def __init__(
        self,
        cap: float,
        before: Decided,
        schedule: Schedule,
        group: WorkerGroup,
        decide: Callable[[int, str, Any], None],
    ):
        self.controller = FactorController(cap=min(cap, schedule.largest_factor()))
        self.schedule, self.group, self.decide = schedule, group, decide
        self.last_decision = max((position for position, _ in before), default=-1)
        self.busy_s, self.served = 0.0, 0  # of the steps since the last look
        self.worked_s, self.prepared = 0.0, 0.0  # of the pool, at the last look

    def after_step(
        self, step: int, served: int, busy_s: float, position: int, counters: Mapping[str, float]
    ) -> None:
        """Take in that step `step` served so many examples in `busy_s` seconds without waiting; now and then
        decide.

        Args:
            position: the next micro-batch of the data stream.
            counters: of this worker's loader.
        """
        self.busy_s += busy_s
        self.served += served
        if step % MEASURED_STEPS or position <= self.last_decision:
            return
        factor = self._proposal(position, counters) if self.group.rank == 0 else None
        factor = self.group.broadcast(factor)
        if factor is not None:
            self.decide(position, ECHO_FACTOR, factor)
            self.schedule.change(position, factor)

    def _proposal(self, position: int, counters: Mapping[str, float]) -> float | None:
        worked_s, prepared = counters["work_s"] - self.worked_s, counters["prepared"] - self.prepared
        downstream_s = self.busy_s / self.served
        self.busy_s, self.served = 0.0, 0
        if not prepared:
            return None
        self.worked_s, self.prepared = counters["work_s"], counters["prepared"]
        upstream_s = worked_s / prepared / counters["processes"]
        return self.controller.propose(upstream_s, downstream_s, float(self.schedule.factor(position)))

"""The number of threads, reconsidered when steps take far longer than the trial before the first one."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from statistics import median

from trainer.compute.execution import Execution
from trainer.distributed.group import WorkerGroup

WINDOW_STEPS = 32
TOO_SLOW = 3.0  # times what the trial took: other processes have taken the cores that threads wait for


class ThreadRevision:
    """Falls back to one thread, on all workers at once, where several turn out far slower than in the trial.

    It changes how sums are rounded, so exact runs, which have one thread, never see it.
    """

    def __init__(self, group: WorkerGroup):
        self.group = group
        self.ratios: deque[float] = deque(maxlen=WINDOW_STEPS)

    def after_step(self, step: int, compute_s: float, micro_batches: int, execution: Execution) -> Execution:
        """The execution of the steps that follow.

        Args:
            compute_s: seconds that this worker computed in the step.
            micro_batches: that it computed in them.
        """
        if execution.threads == 1 or execution.trial_s is None or not micro_batches:
            return execution
        self.ratios.append(compute_s / (micro_batches * execution.trial_s))
        if step % WINDOW_STEPS:
            return execution
        typical = max(self.group.all_gather(median(self.ratios)))
        if typical < TOO_SLOW:
            return execution
        reason = f"steps took {typical:.1f} times what the trial took on {execution.threads} threads: 1 now"
        return replace(execution, threads=1, reason=reason)

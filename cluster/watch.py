"""Whether a group of workers moves, and which of them holds it up.

All workers take each step together, so the group hangs where none has done anything for the longer of
`run.hung_after_s` and ten steps, as its own steps have been measured. Before the first step, and between
steps, there is nothing to measure by: there it has thirty times as long. A worker whose process does not even
answer is not given that time: it is stopped, or dead without anybody's notice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from trainer.distributed.pulse import Report

STEPS = 10  # that a group may take without a sign
UNMEASURED = 30  # times `hung_after_s`, where no step tells what is long
LONGEST_LOOK_S = 1.0  # more time than this between two looks is the driver's own sleep


@dataclass(frozen=True)
class Hung:
    """The workers that hold a group up, and how that is said."""

    ranks: Sequence[int]
    step: int
    reason: str


def named(ranks: Sequence[int]) -> str:
    """Workers as the subject of a sentence."""
    return f"worker {ranks[0]}" if len(ranks) == 1 else f"each of workers {', '.join(map(str, ranks))}"


class Watch:
    """Watches a group whose worker of each rank answers `ask(rank)`, in the end, with a Report."""

    def __init__(self, size: int, hung_after_s: float, ask: Callable[[int], Future]) -> None:
        self.hung_after_s, self.ask = hung_after_s, ask
        self.asked = [ask(rank) for rank in range(size)]
        self.reports: list[Report | None] = [None] * size
        self.now_s, self.looked_at = 0.0, time.monotonic()  # a clock that stands while the driver sleeps
        self.answered_s, self.asked_s = [0.0] * size, [0.0] * size
        self.moved_s = 0.0

    def look(self) -> Hung | None:
        """Hear what workers have answered, ask them again, and say who hangs."""
        now = time.monotonic()
        self.now_s += min(now - self.looked_at, LONGEST_LOOK_S)
        self.looked_at = now
        for rank, answer in enumerate(self.asked):
            if answer.done() and answer.exception() is None:  # of one that died its own call tells
                self._hear(rank, answer.result())
                if self.now_s - self.asked_s[rank] > self.hung_after_s / 20:
                    self.asked[rank], self.asked_s[rank] = self.ask(rank), self.now_s
        return self._silent() or self._still()

    def _hear(self, rank: int, report: Report) -> None:
        before, self.reports[rank] = self.reports[rank], report
        self.answered_s[rank] = self.now_s
        if before is None or report.moves != before.moves:
            self.moved_s = self.now_s

    def _silent(self) -> Hung | None:
        """Those that do not answer."""
        patience_s = max(self.hung_after_s, STEPS * self._step_s())
        silent = [rank for rank, at in enumerate(self.answered_s) if self.now_s - at > patience_s]
        return self._hung(silent, f"gives no sign of life for {patience_s:.0f} s")

    def _still(self) -> Hung | None:
        """Those that are waited for, where nobody moves."""
        reports = [report for report in self.reports if report is not None]
        is_measured = len(reports) == len(self.reports) and all(
            report.in_step and report.longest_step_s and report.waits_for != "the pool's examples"
            for report in reports
        )
        patience_s = max(self.hung_after_s * (1 if is_measured else UNMEASURED), STEPS * self._step_s())
        if self.now_s - self.moved_s <= patience_s:
            return None
        states = {
            rank: (report.waits_for, report.place) for rank, report in enumerate(self.reports) if report
        }
        busy = [rank for rank, (waits_for, _) in states.items() if waits_for is None]
        starved = [rank for rank, (waits_for, _) in states.items() if waits_for == "the pool's examples"]
        if busy:
            return self._hung(busy, f"has been at {states[busy[0]][1]} for {patience_s:.0f} s")
        if starved:
            return self._hung(starved, f"has waited for the pool's examples for {patience_s:.0f} s")
        return self._hung(list(states), f"has waited for the others for {patience_s:.0f} s")

    def _hung(self, ranks: list[int], how: str) -> Hung | None:
        if not ranks:
            return None
        step = max((report.step for report in self.reports if report), default=0) + 1
        return Hung(ranks, step, f"{named(ranks)} {how}, in step {step}")

    def _step_s(self) -> float:
        return max((report.longest_step_s or 0.0 for report in self.reports if report), default=0.0)

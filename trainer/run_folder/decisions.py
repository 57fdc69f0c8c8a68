"""What a run decided from measurements, as its journal tells it: a resumed or replayed run decides the
same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

RATE_FACTOR, ECHO_FACTOR, STOP = "rate_factor", "echo_factor", "stop"

Decided = tuple[tuple[int, float], ...]  # (position of the data that it holds from, value) each


@dataclass(frozen=True)
class Decisions:
    """`rate_factors` multiply the learning rate after roll-backs; `echo_factors` replace one another."""

    rate_factors: Decided = ()
    echo_factors: Decided = ()

    @classmethod
    def of(cls, lines: Iterable[dict[str, Any]]) -> Decisions:
        """Those among a journal's lines, in the order in which they were taken."""
        taken = [line for line in lines if line["kind"] == "decision"]

        def values(what: str) -> Decided:
            found = [(line["position"], line["value"]) for line in taken if line["what"] == what]
            return tuple((at, value) for at, value in found if isinstance(value, int | float))

        return cls(values(RATE_FACTOR), values(ECHO_FACTOR))

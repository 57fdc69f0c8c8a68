"""Prepared examples kept in memory, for trainings that follow one another on the same data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_echo.prepare.example_form import PreparedArrays
from data_echo.prepare.preparer import Preparer, PrepareRequest, PrepareStats

KEPT_BYTES = 1 << 30  # of each split
REQUEST_EXAMPLES = 1024
REQUESTS_AHEAD = 4


class KeptPreparer:
    """Prepares each split once, whole, where that is the same in every pass and fits in memory; any other
    request goes to the preparer behind it.

    Args:
        preparer: prepares what is not kept.
        examples: the length of each split.
    """

    def __init__(self, preparer: Preparer, examples: Mapping[str, int]) -> None:
        self._preparer, self._examples = preparer, examples
        self._kept: dict[str, PreparedArrays | None] = {}

    @property
    def stats(self) -> PrepareStats:
        """Totals of what was prepared."""
        return self._preparer.stats

    @property
    def processes(self) -> int:
        """Processes that prepare at the same time."""
        return self._preparer.processes

    def arrays(self, split: str) -> PreparedArrays | None:
        """Every example of a split, [examples, ...]; None where it cannot be kept: it is too large, or its
        preparation draws random numbers, which another pass or seed draws anew.
        """
        if split not in self._kept:
            self._kept[split] = self._whole(split)
        return self._kept[split]

    def submit(self, request: PrepareRequest) -> object:
        """See `Preparer.submit`."""
        kept = self.arrays(request.split)
        if kept is None:
            return self._preparer.submit(request)
        return {name: array[request.index] for name, array in kept.items()}

    def collect(self, pending: object) -> PreparedArrays:
        """See `Preparer.collect`."""
        return pending if isinstance(pending, dict) else self._preparer.collect(pending)

    def close(self) -> None:
        """Close the preparer behind."""
        self._preparer.close()

    def _whole(self, split: str) -> PreparedArrays | None:
        length = self._examples[split]
        starts = range(0, length, REQUEST_EXAMPLES)
        parts: list[PreparedArrays] = []
        pending = [self._submitted(split, start) for start in starts[:REQUESTS_AHEAD]]
        for start in starts:
            part = self._preparer.collect(pending.pop(0))
            parts.append(part)
            bytes_per_example = sum(array.nbytes for array in part.values()) / len(next(iter(part.values())))
            if bytes_per_example * length > KEPT_BYTES or self.stats.drew:
                for each in pending:
                    self._preparer.collect(each)
                return None
            if (ahead := start + REQUESTS_AHEAD * REQUEST_EXAMPLES) < length:
                pending.append(self._submitted(split, ahead))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _submitted(self, split: str, start: int) -> object:
        index = np.arange(start, min(start + REQUEST_EXAMPLES, self._examples[split]))
        return self._preparer.submit(PrepareRequest(split, np.zeros_like(index), index))

"""Where two passes over a small dataset meet, one example can fall twice into a micro-batch: such slots are
swapped away.
"""

from __future__ import annotations

import numpy as np

from data_echo.order.hashing import Ints


def spread_repeats(index: Ints, fresh: np.ndarray) -> Ints | None:
    """The order of a period's slots in which no micro-batch holds an example twice, where that is possible.

    Only slots of one lane and of the same kind (fresh or repeated) change places, so demand for fresh
    examples stays even.

    Args:
        index: int64 [lanes, micro-batches, slots], the examples.
        fresh: bool, likewise, whether the slot shows a first copy.

    Returns:
        int64 [lanes, micro-batches * slots], for each slot the one to take instead; None when nothing
        repeats.
    """
    ordered = np.sort(index, axis=2)
    repeats = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)
    if not repeats.any():
        return None
    lanes, batches, slots = index.shape
    order = np.tile(np.arange(batches * slots), (lanes, 1))
    for lane in np.flatnonzero(repeats.any(axis=1)):
        swaps = _Swaps(index[lane], fresh[lane])
        for batch in np.flatnonzero(repeats[lane]):
            swaps.clear(int(batch))
        order[lane] = swaps.order
    return order


class _Swaps:
    def __init__(self, index: Ints, fresh: np.ndarray) -> None:
        self._index = index.copy()
        self._fresh = fresh
        self._members: dict[int, set[int]] = {}
        self.order = np.arange(index.size)

    def clear(self, batch: int) -> None:
        """Swap a micro-batch's repeated examples into others."""
        seen: set[int] = set()
        for slot, example in enumerate(self._index[batch].tolist()):
            if example in seen:
                self._swap_away(batch, slot, example)
            seen.add(int(self._index[batch, slot]))

    def _swap_away(self, batch: int, slot: int, example: int) -> None:
        here, batches = self._in(batch), len(self._index)
        for other in (number % batches for number in range(batch + 1, batch + batches)):
            if example in self._in(other):
                continue
            for place in np.flatnonzero(self._fresh[other] == self._fresh[batch, slot]):
                candidate = int(self._index[other, place])
                if candidate not in here:
                    self._exchange((batch, slot), (other, int(place)))
                    here.add(candidate)  # the example itself stays in `here`: its other copy does
                    return

    def _exchange(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        index, order = self._index, self.order.reshape(self._index.shape)
        index[one], index[other] = index[other], index[one]
        order[one], order[other] = order[other], order[one]
        self._members[other[0]] = set(index[other[0]].tolist())

    def _in(self, batch: int) -> set[int]:
        if batch not in self._members:
            self._members[batch] = set(self._index[batch].tolist())
        return self._members[batch]

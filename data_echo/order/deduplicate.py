"""Deduplication of micro-batches of a small dataset: where two passes meet, one example can fall twice into a
micro-batch, and one of its slots is swapped into another micro-batch.
"""

from __future__ import annotations

import numpy as np

from data_echo.order.hashing import Ints


def separate_duplicates(index: Ints, fresh: np.ndarray) -> Ints | None:
    """Permutation of a period's slots so that no micro-batch holds an example twice, where that is possible.

    Only slots of one lane and of the same kind (fresh or echoed) change places, so demand for fresh examples
    stays even.

    Args:
        index: int64 [lanes, micro-batches, slots], the examples.
        fresh: bool [lanes, micro-batches, slots], whether the slot serves a first copy.

    Returns:
        int64 [lanes, micro-batches * slots], for each slot the one to take instead; None without duplicates.
    """
    ordered = np.sort(index, axis=2)
    duplicates = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)
    if not duplicates.any():
        return None
    lanes, batches, slots = index.shape
    taken = np.tile(np.arange(batches * slots), (lanes, 1))
    for lane in np.flatnonzero(duplicates.any(axis=1)):
        swaps = _Swaps(index[lane], fresh[lane])
        for batch in np.flatnonzero(duplicates[lane]):
            swaps.separate(int(batch))
        taken[lane] = swaps.taken
    return taken


class _Swaps:
    """Swaps between one lane's micro-batches; `taken` is the slot that each slot takes: int64 [slots]."""

    def __init__(self, index: Ints, fresh: np.ndarray) -> None:
        self._index = index.copy()
        self._fresh = fresh
        self._members: dict[int, set[int]] = {}
        self.taken = np.arange(index.size)

    def separate(self, batch: int) -> None:
        """Swap a micro-batch's duplicates into other micro-batches."""
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
        index, taken = self._index, self.taken.reshape(self._index.shape)
        index[one], index[other] = index[other], index[one]
        taken[one], taken[other] = taken[other], taken[one]
        self._members[other[0]] = set(index[other[0]].tolist())

    def _in(self, batch: int) -> set[int]:
        if batch not in self._members:
            self._members[batch] = set(self._index[batch].tolist())
        return self._members[batch]

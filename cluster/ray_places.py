"""What a run has reserved on a Ray cluster: places for its workers, so many to so many, and for its pool.

The fewest workers and the pool have one placement group, all of it or nothing. Each further worker has one of
its own, which Ray fills when there is room, now or hours later; its autoscaler, too, sees what is wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from typing import Any

FURTHER_S = 1.0  # that a start waits for places beyond the fewest; most are there at once
PLACING_S = 10.0  # until the user is told what the group waits for
LOOK_INTERVAL_S = 0.05
NEW_INTERVAL_S = 2.0  # between looks for new room while the run trains


class Places:
    """Numbered places for `fewest` to `most` workers with `resources` each, and for `pool_size` actors.

    Args:
        say: tells the user what is waited for.
    """

    def __init__(
        self,
        fewest: int,
        most: int,
        resources: dict[str, float],
        pool_size: int,
        say: Callable[[str], None],
    ) -> None:
        from ray.util.placement_group import placement_group

        self.fewest, self.most, self.resources, self.pool_size = fewest, most, resources, pool_size
        self.say, self.looked_at = say, time.monotonic()
        self.together = placement_group([resources] * fewest + [{"CPU": 1}] * pool_size, strategy="PACK")
        self.further = [self._one_more() for _ in range(fewest, most)]

    def wait(self, refuse_lost: Callable[[], None]) -> list[int]:
        """The places that can be used, once these are the fewest at least.

        Args:
            refuse_lost: raises where the cluster has died.
        """
        began, is_told = time.monotonic(), False
        while not _is_there(self.together):
            refuse_lost()
            waited_s = time.monotonic() - began
            if waited_s > PLACING_S and not is_told:
                self._tell_what_is_missing()
                is_told = True
            if waited_s > FURTHER_S and self.usable_further():  # they may have what the fewest need
                self._give_up_further()
            time.sleep(LOOK_INTERVAL_S)
        self.further += [self._one_more() for _ in range(len(self.further), self.most - self.fewest)]
        deadline = time.monotonic() + FURTHER_S
        while len(self.usable_further()) < len(self.further) and time.monotonic() < deadline:
            time.sleep(LOOK_INTERVAL_S)
        return [*range(self.fewest), *self.usable_further()]

    def new_further(self, known: Set[int]) -> list[int]:
        """Places that have come to be usable beside those that are known; looked for now and then."""
        now = time.monotonic()
        if len(known) == self.most or now - self.looked_at < NEW_INTERVAL_S:
            return []
        self.looked_at = now
        return [place for place in self.usable_further() if place not in known]

    def usable_further(self) -> list[int]:
        """The places beyond the fewest that can be used now."""
        return [self.fewest + i for i, group in enumerate(self.further) if _is_there(group)]

    def is_usable(self, place: int) -> bool:
        """Whether a place has not been lost with its node."""
        return _is_there(self.together if place < self.fewest else self.further[place - self.fewest])

    def strategy(self, place: int) -> Any:
        """Where Ray starts a worker."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if place < self.fewest:
            return PlacementGroupSchedulingStrategy(self.together, place)
        return PlacementGroupSchedulingStrategy(self.further[place - self.fewest], 0)

    def started(self, actor: Any, place: int) -> Any:
        """A worker, an instance of a Ray actor's class, in a place."""
        options = {"num_cpus": self.resources["CPU"], "num_gpus": self.resources.get("GPU", 0)}
        return actor.options(**options, scheduling_strategy=self.strategy(place)).remote()

    def pool_strategy(self, number: int) -> Any:
        """Where Ray starts an actor of the pool."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self.together, self.fewest + number)

    def close(self) -> None:
        """Give back all."""
        from ray.util.placement_group import remove_placement_group

        self._give_up_further()
        remove_placement_group(self.together)

    def _one_more(self) -> Any:
        from ray.util.placement_group import placement_group

        return placement_group([self.resources])

    def _give_up_further(self) -> None:
        from ray.util.placement_group import remove_placement_group

        while self.further:
            remove_placement_group(self.further.pop())

    def _tell_what_is_missing(self) -> None:
        import ray

        wanted = f"{self.fewest} workers with {self.resources} each and {self.pool_size} CPUs for the pool"
        total = ray.cluster_resources()
        has = ", ".join(f"{total.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
        self.say(f"waiting for {wanted}; the cluster has {has} in all")


def _is_there(group: Any) -> bool:
    """Whether Ray has found nodes for a placement group, and they live."""
    from ray.util.placement_group import placement_group_table

    return placement_group_table(group).get("state") == "CREATED"

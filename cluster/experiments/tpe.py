"""Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), asked and told."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

from trainer.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

WORST = 1e6  # what is told of a rate with which training diverges, in ln steps


class RateSampler:
    """Proposes rates, in octaves, within `reach` of a first one; the same ones to the same answers.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(self, first: float, reach: float, name: str) -> None:
        try:
            import optuna
        except ModuleNotFoundError as error:
            right = "`pip install 'optuna>=5,<6'`, or let rate.search be bracket"
            raise UserError(f"rate.search: is optuna, and it is not installed; {right}") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=zlib.crc32(name.encode()))
        self._study = optuna.create_study(sampler=sampler)
        self._study.enqueue_trial({"octaves": first})
        self._range = first - reach, first + reach
        self._asked: Trial | None = None

    def ask(self) -> float:
        """The next rate."""
        self._asked = self._study.ask()
        return self._asked.suggest_float("octaves", *self._range)

    def tell(self, ln_steps: float) -> None:
        """What the latest rate has brought."""
        assert self._asked is not None
        self._study.tell(self._asked, ln_steps if math.isfinite(ln_steps) else WORST)

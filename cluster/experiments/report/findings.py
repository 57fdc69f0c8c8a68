"""What a report is about: curves and where they come from, with the forecasts that were graded on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.experiments.calibration import Grade, graded
from cluster.experiments.curve import Curve, curves, prior_of
from cluster.experiments.forecast import Prediction, Prior
from cluster.experiments.references import mlperf
from cluster.experiments.trials import Study, Trial

OCTAVES_HELD_BACK = 3  # of the largest batches, forecast from the smaller ones to show how well that works


@dataclass(frozen=True)
class Findings:
    """One part of a report.

    Attributes:
        title, about: what it is, in a few words and in a sentence.
        curves: one per arm or task.
        trials: of a sweep, all of them.
        backtest: the largest batches, forecast from the smaller ones.
        is_one_task: the curves are of one task, so that their steps can be compared.
    """

    title: str
    about: str
    curves: tuple[Curve, ...]
    trials: tuple[Trial, ...] = ()
    backtest: tuple[Grade, ...] = ()
    is_one_task: bool = True

    @classmethod
    def of(cls, study: Study) -> Findings:
        """Of a sweep."""
        found = curves(study)
        target = study.target
        side = (
            f"at most {target.at_most:g}" if target.at_most is not None else f"at least {target.at_least:g}"
        )
        examples = sum(trial.examples for trial in study.trials)
        about = (
            f"{len(study.trials):,} trials, {examples:,} examples; "
            f"trained until validation {target.metric} was {side}."
        )
        return cls(study.name, about, tuple(found), tuple(study.trials), tuple(_backtest(found, True)))


def references() -> Findings:
    """Of MLPerf's tables."""
    found = [reference.curve for reference in mlperf().values()]
    about = "MLPerf Training's reference convergence points: " + "; ".join(
        f"{name}: {reference.title}, until {reference.target}" for name, reference in mlperf().items()
    )
    return Findings("MLPerf", f"{about}.", tuple(found), (), tuple(_backtest(found, False)), False)


def _backtest(found: Sequence[Curve], is_one_task: bool) -> list[Grade]:
    grades = []
    for curve in found:
        batches = [point.batch for point in curve.usable]
        if not batches or max(batches) < 2**OCTAVES_HELD_BACK * min(batches):
            continue
        cut = max(batches) // 2**OCTAVES_HELD_BACK
        if sum(batch <= cut for batch in batches) < 3:
            continue
        others = [other.up_to(cut) for other in found] if is_one_task else []
        prior = prior_of(curve, others)

        def forecasts(small: Curve, wanted: Sequence[int], prior: Prior | None = prior) -> list[Prediction]:
            forecaster = small.forecaster(prior)
            return [forecaster.predict(batch, small.measured[2][-1]) for batch in wanted]

        grades += graded(curve, cut, max(batches), forecasts)
    return grades

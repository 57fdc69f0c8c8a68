"""Forecasts: their distribution, how often they hold on digits, and what one more trial would tell."""

import numpy as np
import pytest

from cluster.experiments.calibration import (
    Calibration,
    Grade,
    by_bootstrap,
    graded,
    leave_one_out,
    parts,
    with_settings,
)
from cluster.experiments.forecast import Forecaster, Prediction, Prior, Settings, probe
from tests.cluster.experiments.digits_study import digits

BATCHES = [4, 8, 16, 32, 64]


def exact(b_crit: float) -> list[float]:
    return [20 * (1 + b_crit / batch) for batch in BATCHES]


def test_a_forecast_narrows_to_the_law_as_errors_vanish():
    settings = Settings(model_error=0.005, growth=0, bend=0)
    forecaster = Forecaster.fit(BATCHES, exact(80), [5] * 5, 0.005, settings=settings)
    prediction = forecaster.predict(256)
    assert prediction.median == pytest.approx(20 * (1 + 80 / 256), rel=0.02)
    assert prediction.width < 1.2


def test_intervals_grow_with_distance_and_shrink_with_runs():
    forecaster = Forecaster.fit(BATCHES, exact(80), [5] * 5, 0.15)
    widths = [forecaster.predict(batch).width for batch in (64, 128, 256, 512, 1024)]
    assert widths == sorted(widths)
    assert forecaster.predict(256, runs=5).width < forecaster.predict(256, runs=1).width
    assert forecaster.predict(256, level=0.5).width < forecaster.predict(256).width


def test_an_interval_holds_what_its_own_distribution_gives():
    forecaster = Forecaster.fit(BATCHES, exact(80), [5] * 5, 0.15)
    prediction = forecaster.predict(512)
    assert forecaster.chance(512, prediction.high) == pytest.approx(0.9, abs=0.005)
    assert forecaster.chance(512, prediction.low) == pytest.approx(0.1, abs=0.005)


def test_a_prior_decides_where_the_batches_do_not():
    """All batches far below the critical one: the data say nothing of the bend."""
    steps = [1e5 / batch for batch in BATCHES]
    open_ = Forecaster.fit(BATCHES, steps, [5] * 5, 0.1).predict(4096)
    told = Forecaster.fit(BATCHES, steps, [5] * 5, 0.1, Prior(1000, 0.3)).predict(4096)
    assert told.width < open_.width / 2
    far = Forecaster.fit(BATCHES, steps, [5] * 5, 0.1, Prior(1e6, 0.3)).predict(4096)
    assert far.median == pytest.approx(1e5 / 4096, rel=0.15)


def test_a_prior_of_one_known_batch_is_wider_than_of_many():
    assert Prior.of([80]).log_sd > Prior.of([80, 80, 80]).log_sd > 0.5
    assert Prior.of([50, 200]).b_crit == pytest.approx(100)


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match="two or more"):
        Forecaster.fit([8, 8], [10, 11], [1, 1], 0.1)


def test_the_score_is_the_width_and_the_distance_of_a_miss():
    inside = Grade("a", Prediction(8, 1, 2, 4, 0.8), 3)
    outside = Grade("a", Prediction(8, 1, 2, 4, 0.8), 8)
    assert inside.is_held
    assert not outside.is_held
    assert inside.penalty == pytest.approx(np.log(4))
    assert outside.penalty == pytest.approx(np.log(4) + 10 * np.log(2))


def test_forecasts_of_digits_hold_as_often_as_they_say():
    """Fitted up to batch 64, graded at 128 to 512; settings and prior are the other optimizers'."""
    calibration, chosen = leave_one_out(parts(list(digits().values()), 5), 64, 512)
    low, high = calibration.coverage_interval()
    assert low <= 0.8 <= high
    assert min(calibration.coverage_by_name.values()) >= 0.5
    assert calibration.width <= 2.5
    assert set(chosen) == set(digits())


def test_the_settings_that_ship_hold_on_digits_and_seeds_alone_do_not():
    repeated = parts(list(digits().values()), 5)
    bayes = Calibration(tuple(with_settings(repeated, 64, 512)))
    seeds = [
        grade for curves in repeated for curve in curves for grade in graded(curve, 64, 512, by_bootstrap)
    ]
    assert bayes.coverage >= 0.8
    assert bayes.width <= 2.5
    assert Calibration(tuple(seeds)).coverage < 0.7


def test_one_trial_beyond_the_batches_halves_the_interval():
    curve = digits()["lars"].up_to(64)
    found = probe(*curve.measured, 512)
    assert 64 < found.batch <= 512
    assert np.log(found.width_after) <= np.log(found.width_before) / 2 or found.batch == 512
    # What it says of the interval is what a fit with the trial gives.
    batches, steps, runs, seed_sd = curve.measured
    likely = curve.forecaster().predict(found.batch).median
    then = Forecaster.fit([*batches, found.batch], [*steps, likely], [*runs, 1], seed_sd)
    assert then.predict(512).width == pytest.approx(found.width_after)

"""The plot of a plan against the schedule that it draws."""

import numpy as np
import pytest

from tests.trainer.plans import planned
from tests.trainer.test_plan import Points, recipe
from trainer.plan import plot
from trainer.plan.plan import Plan
from trainer.plan.schedules import LearningRate

GROWING = "batch.growth={shape: multiply, at: [{epochs: 5}], factor: 4}"


def made(*overrides: str) -> Plan:
    return planned(recipe(*overrides), Points())


def test_points_are_the_schedule_s():
    growing = made(GROWING, "schedule.decay={shape: cosine}")
    curve = plot.points(growing, 100)
    rate = LearningRate(growing.recipe, 1000, 10_000)
    assert [point.served for point in curve] == list(range(0, 10_000, 100))
    assert [point.batch_size for point in curve] == [96] * 50 + [384] * 50
    assert all(point.learning_rate == rate.rate(point.served, point.batch_size) for point in curve)


def test_the_drawing_s_heights_are_the_rates():
    drawn = plot.lines(made("schedule.decay={shape: polynomial}"), width=61, height=8)
    assert drawn[0] == "learning rate"
    panel = np.array([list(line[11:].ljust(50)) for line in drawn[1:9]])
    heights = [sum(plot.EIGHTHS.index(cell) for cell in column) / 64 for column in panel.T]
    rates = [point.learning_rate for point in plot.points(made("schedule.decay={shape: polynomial}"), 50)]
    assert heights == pytest.approx([rate / max(rates) for rate in rates], abs=1 / 128)
    assert drawn[1].lstrip().startswith("0.04 ")
    assert drawn[-1].endswith("10,000 examples")


def test_a_growing_batch_has_its_own_panel():
    assert "batch" not in plot.lines(made())
    drawn = plot.lines(made(GROWING))
    top = drawn[drawn.index("batch") + 1]
    assert top.split()[0] == "384"
    assert max(map(len, drawn)) <= 80

"""Steps to target that others have published: MLPerf's reference convergence points, every run of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from cluster.experiments.curve import Curve, Point


@dataclass(frozen=True)
class Reference:
    """A task of MLPerf Training: the runs at each batch with the rate that the table gives."""

    title: str
    target: str
    source: str  # the file's address
    curve: Curve

    @property
    def b_crit(self) -> float:
        """Its critical batch."""
        assert self.curve.steps_law is not None
        return self.curve.steps_law.b_crit


@cache
def mlperf() -> dict[str, Reference]:
    """The tables that ship, by name."""
    content = json.loads((files("cluster.experiments") / "mlperf.json").read_text())
    references = {}
    for table in content["tables"]:
        size = table["examples_per_unit"]
        points = tuple(
            Point(p["batch"], tuple(run * size / p["batch"] for run in p["runs"]), p["rate"])
            for p in table["points"]
        )
        curve = Curve(table["name"], points, trials=sum(len(p.runs) for p in points))
        source = f"{content['source']}/{table['file']}"
        references[table["name"]] = Reference(table["title"], table["target"], source, curve)
    return references

"""The command `lockstep sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.console import Console
from cluster.experiments import plan as plans
from cluster.experiments.plan import SweepPlan
from trainer.run_folder import layout


def sweep(
    path: str,
    overrides: Sequence[str],
    *,
    local: bool,
    address: str | None,
    resume: bool = False,
    extend: bool = False,
    dry_run: bool = False,
    folder: Path | None = None,
) -> None:
    """Run a sweep, or say what it would try."""
    console = Console()
    plan = plans.read(path, overrides)
    with console.waiting("loading the task"):
        from cluster.experiments import local_groups
        from cluster.experiments import sweep as sweeps

        lengths = sweeps.Lengths(plan)
    console.say("\n".join(f"  {line}" for line in described(plan)))
    if dry_run:
        return
    folder = sweeps.folder_of(plan, resume=resume, extend=extend, folder=folder)
    console.say(f"  sweep folder: {layout.relative_to_cwd(folder)}")
    device = next(iter(plan.arms.values())).run.device
    growth = plan.sweep.target.evaluate.growth
    sweeps.run(plan, lengths, folder, partial(local_groups.in_process, growth, device), console)


def described(plan: SweepPlan) -> list[str]:
    """What is tried, a line for each question."""
    sweep, target = plan.sweep, plan.sweep.target
    to = f"at least {target.at_least:g}" if target.at_least is not None else f"at most {target.at_most:g}"
    cells = plan.cells()
    return [
        f"target   {target.metric} {to} on the validation split",
        f"arms     {', '.join(plan.arms)}",
        f"batches  {', '.join(map(str, sweep.batches))}",
        *(f"axis     {key}: {', '.join(map(str, values))}" for key, values in sweep.also.items()),
        f"cells    {len(cells)}, in {len(plan.strands())} searches",
    ]

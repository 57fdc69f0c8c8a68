"""The command `lockstep sweep`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import ray_launcher
from cluster.console import Console
from cluster.experiments import plan as plans
from cluster.experiments.plan import SweepPlan
from trainer.errors import UserError
from trainer.run_folder import layout

if TYPE_CHECKING:
    from cluster.experiments.shared_data import TaskInputs
    from cluster.experiments.sweep import Groups, Lengths

USUAL_RATES = 5  # that a bracket tries in a cell: benchmarks/search.py


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
    if not local:
        refuse_idle_workers(plan)
        address = ray_launcher.address_of(address)  # asked whether it answers
    with console.waiting("loading the task"):
        from cluster.experiments import sweep as sweeps

        lengths = sweeps.Lengths(plan)
    console.say("\n".join(f"  {line}" for line in described(plan)))
    if dry_run:
        console.say("\n".join(f"  {line}" for line in expected(plan, lengths)))
        return
    folder = sweeps.folder_of(plan, resume=resume, extend=extend, folder=folder)
    console.say(f"  sweep folder: {layout.relative_to_cwd(folder)}")
    inputs = lengths.inputs if local else None
    sweeps.run(plan, lengths, folder, lambda: _groups(plan, inputs, address, folder, console), console)


@contextmanager
def _groups(
    plan: SweepPlan, loaded: TaskInputs | None, address: str | None, folder: Path, console: Console
) -> Iterator[Groups]:
    """What trains the trials: this process, with what it has loaded, or for None worker groups on Ray."""
    run = plan.first_recipe.run
    growth = plan.sweep.target.evaluate.growth
    if loaded is not None:
        from cluster.experiments.local_groups import in_process

        with in_process(growth, run.device, loaded) as groups:
            yield groups
        return
    from cluster.experiments.ray_groups import on_ray

    count = plan.sweep.run.groups
    with ExitStack() as stack:
        stack.enter_context(console.alone(folder / layout.LOG))
        yield stack.enter_context(
            on_ray(address, count, run.most_workers, growth, run.device, console.waiting, console.say)
        )


def refuse_idle_workers(plan: SweepPlan) -> None:
    """UserError where a group would be wider than a batch has work for: a group stays from trial to trial."""
    for cell in plan.cells():
        wanted = plan.arms[cell.arm].run.most_workers
        works = plan.recipe(cell, 1.0, 0).run.most_workers
        if works < wanted:
            right = f"let run.workers be {works}, batch.micro be smaller, or batches larger; or give --local"
            raise UserError(f"batches: {cell} has work for {works} of a group's {wanted} workers; {right}")


def expected(plan: SweepPlan, lengths: Lengths) -> list[str]:
    """How many trials there will be, and what they may serve at most."""
    sweep, cells = plan.sweep, plan.cells()
    more, seeds = len(sweep.seeds.search) - 1, sweep.seeds.report
    usual, most = {
        "bracket": (USUAL_RATES + more, sweep.rate.trials + more),
        "optuna": (sweep.rate.trials + more,) * 2,
        "grid": (len(sweep.rate.values) * len(sweep.seeds.search),) * 2,
    }[sweep.rate.search]
    each = max(lengths.steps(cell) * cell.batch for cell in cells)
    return [
        f"trials   about {len(cells) * (usual + seeds):,}: {usual} in each search, and {seeds} fresh seeds",
        f"examples at most {each:,} in a trial, {len(cells) * (most + seeds) * each:,} in all; trials stop "
        f"at the target, or after {sweep.stop.after_best:g} times the steps of their cell's best one",
    ]


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

"""The command `lockstep`. What a command needs is imported inside it: `lockstep` itself starts at once."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from cluster.exit_codes import messages

overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe; may be repeated.",
)
recipe = click.argument("recipe", metavar="RECIPE")
debug = click.option("--debug", is_flag=True, help="Show tracebacks.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def lockstep() -> None:
    """Large-batch training in lockstep on any number of workers, from one recipe."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors become messages and exit codes: 2 refused, 1 stopped, 130 interrupted."""

    @lockstep.command(name=function.__name__.rstrip("_"))
    @debug
    @wraps(function)
    def guarded(*arguments: Any, debug: bool, **options: Any) -> None:
        with messages(debug):
            function(*arguments, **options)

    return guarded


accept = click.option(
    "--accept",
    multiple=True,
    type=click.Choice(["recipe", "code", "data"]),
    help="On resuming: what may differ from what the run began with; may be repeated.",
)
local = click.option("--local", is_flag=True, help="In this process, without Ray.")
profile = click.option(
    "--profile",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Profile N steps with torch's profiler.",
)
cluster_address = click.option(
    "--address", metavar="ADDRESS", help="A running Ray cluster; else RAY_ADDRESS, else one of our own."
)
directory = click.option(
    "--dir", "directory", default="runs", show_default=True, help="The folder that holds the runs."
)


@command
@recipe
@overrides
@local
@click.option("--resume", is_flag=True, help="Resume the newest run of this name.")
@accept
@profile
@cluster_address
def train(
    recipe: str,
    overrides: tuple[str, ...],
    local: bool,
    resume: bool,
    accept: tuple[str, ...],
    profile: int,
    address: str | None,
) -> None:
    """Train a recipe: on Ray workers, in this process, or as one of torchrun's."""
    if accept and not resume:
        raise click.UsageError("--accept is for --resume")
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"lockstep train {recipe}")
    _train(recipe, overrides, local, address, profile, resume=resume, accept=accept)


@command
@click.argument("run", metavar="RUN")
@directory
@overrides
@local
@accept
@profile
@cluster_address
def resume(
    run: str,
    directory: str,
    overrides: tuple[str, ...],
    local: bool,
    accept: tuple[str, ...],
    profile: int,
    address: str | None,
) -> None:
    """Resume a run or a sweep, by its name or its folder, with what it began with."""
    from trainer.run_folder import layout

    folder = layout.named(directory, run)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"lockstep resume {layout.relative_to_cwd(folder)}")
    if layout.is_sweep(folder):
        from cluster.experiments import command

        if accept or profile:
            raise click.UsageError("--accept and --profile are for runs, and this is a sweep")
        stored = str(folder / layout.SWEEP)
        command.sweep(stored, overrides, local=local, address=address, resume=True, folder=folder)
        return
    recipe = str(folder / layout.RECIPE)
    _train(recipe, overrides, local, address, profile, resume=True, accept=accept, folder=folder)


def _train(
    recipe: str, overrides: tuple[str, ...], local: bool, address: str | None, profile: int, **options: Any
) -> None:
    if profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read as torch loads; the profiler announces itself
    from cluster import driver, local_launcher, ray_launcher
    from cluster.console import Console

    flags = " --local" if local else f" --address {address}" if address else ""
    chosen = driver.TrainOptions(profile=profile, command=f"lockstep resume {{run}}{flags}", **options)
    if local_launcher.is_torchrun():
        return local_launcher.train_under_torchrun(recipe, overrides, chosen)
    console = Console()
    local_launcher.leave_torchrun(console)
    if local:
        overrides = (*overrides, "run.workers=1")
    planned = driver.prepare(recipe, overrides, console)
    address = None if local else ray_launcher.address_of(address)  # asked whether it answers
    if address is None:
        ray_launcher.refuse_what_does_not_fit(planned.recipe)
    if local:
        return driver.train(planned, local_launcher.in_process, console, chosen)
    return driver.train(planned, ray_launcher.on(address), console, chosen, keep_noise=True)


@command
@click.argument("sweep", metavar="SWEEP")
@overrides
@local
@click.option("--resume", is_flag=True, help="Go on with the newest sweep of this name.")
@click.option("--extend", is_flag=True, help="The same, with more batches, arms or seeds than it had.")
@click.option("--dry-run", is_flag=True, help="Say what would be tried, and at most how much that is.")
@cluster_address
def sweep(
    sweep: str,
    overrides: tuple[str, ...],
    local: bool,
    resume: bool,
    extend: bool,
    dry_run: bool,
    address: str | None,
) -> None:
    """Try a recipe at many batches and rates: which is best at each, and what does it take."""
    from cluster.experiments import command

    click.echo(f"lockstep sweep {sweep}")
    command.sweep(
        sweep, overrides, local=local, address=address, resume=resume, extend=extend, dry_run=dry_run
    )


@command
@click.argument("run", metavar="RUN")
@directory
@click.option(
    "--split", type=click.Choice(["test", "validation", "train"]), default="test", show_default=True
)
def evaluate(run: str, directory: str, split: str) -> None:
    """Evaluate a run's trained weights, or those of its newest checkpoint, on a split of its data."""
    from cluster import evaluate
    from trainer.run_folder import layout

    click.echo("\n".join(evaluate.evaluate(layout.named(directory, run), split)))


@command
@recipe
@overrides
@click.option("--plot", is_flag=True, help="Draw the learning rate and the batch over the run.")
@click.option(
    "--order", type=click.IntRange(min=1), metavar="N", help="Print what the first N micro-batches serve."
)
def check(recipe: str, overrides: tuple[str, ...], plot: bool, order: int | None) -> None:
    """Check a recipe and show it resolved, with its plan."""
    from cluster import driver
    from trainer.plan import memory, rehearsal, report
    from trainer.plan.inputs import Inputs
    from trainer.plan.plan import echo_schedule, resolve
    from trainer.recipe import loader

    resolved = driver.read(recipe, overrides)
    inputs = Inputs.of(resolved)
    plan = resolve(resolved, inputs)
    if order:
        from data_echo import order_lines

        for line in order_lines(echo_schedule(resolved, plan.examples["train"]), order):
            click.echo(line)
        return
    click.echo(loader.dump(resolved))
    more = [*memory.rows(plan, inputs.task), *rehearsal.rows(plan, inputs.task)]
    click.echo("\n".join(report.lines(plan, more)))
    if plot:
        from trainer.plan import plot as plots

        click.echo("\n".join(["", *plots.lines(plan)]))


@command
@click.argument("name", metavar="[NAME]", required=False)
@click.option(
    "--compare",
    metavar="MODULE:CLASS",
    help="say by its steps which variant of LARS, LAMB, NovoGrad, Adafactor or SM3 a class is",
)
def optimizers(name: str | None, compare: str | None) -> None:
    """Show the optimizers, or all about one of them."""
    import optim
    from trainer.errors import UserError
    from trainer.recipe.messages import nearest

    if compare is not None:
        try:
            click.echo(str(optim.passport(compare)))
        except ValueError as error:
            raise UserError(str(error)) from error
    elif name is None:
        click.echo(optim.table())
    elif name in optim.names():
        click.echo(optim.describe(name))
    else:
        raise UserError(f"{name}: is no optimizer; {nearest(name, optim.names())}")


@command
@click.option("--sweep", is_flag=True, help="That of a sweep's file.")
def schema(sweep: bool) -> None:
    """Print the recipe's JSON Schema, for editors."""
    import json

    from trainer.recipe.schema import Recipe
    from trainer.recipe.sweep import Sweep

    click.echo(json.dumps((Sweep if sweep else Recipe).model_json_schema(), indent=2))


@command
@click.argument("run", metavar="[RUN|SWEEP]", required=False)
@directory
@click.option("--uri", metavar="URI", help="Where the runs are; else MLFLOW_TRACKING_URI, else ./mlflow.db.")
@click.option("--port", type=int, help="Port on the loopback interface; else 5000, or a free one.")
def ui(run: str | None, directory: str, uri: str | None, port: int | None) -> None:
    """Open the MLflow UI on this machine, where a run or a sweep is."""
    from cluster import mlflow_ui as ui
    from cluster.console import Console
    from trainer.run_folder import layout

    if run is None:
        ui.serve(uri, port, Console())
    elif uri is None:
        ui.show(layout.named(directory, run), port, Console())
    else:
        raise click.UsageError("--uri is for all runs, and a run says where it is")


@command
@click.argument("names", nargs=-1, metavar="[RUN]...")
@directory
@click.option("--prune", is_flag=True, help="Remove the checkpoints of finished runs, all or those named.")
def runs(names: tuple[str, ...], directory: str, prune: bool) -> None:
    """List the runs and sweeps of a folder; compare the runs that are named."""
    from cluster import runs

    if prune:
        lines = runs.prune(directory, names)
    else:
        lines = runs.comparison(directory, names) if names else runs.listing(directory)
    click.echo("\n".join(lines))


@command
@click.argument("names", nargs=-1, metavar="[SWEEP|RUN]...")
@directory
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page to send to others."
)
@click.option("--figures", type=click.Path(path_type=Path), metavar="FOLDER", help="Write SVG and PNG files.")
@click.option("--csv", "form", flag_value="csv", help="Print each curve's points as CSV.")
@click.option("--md", "form", flag_value="md", help="Print Markdown.")
@click.option("--reference", type=click.Choice(["mlperf"]), help="Report published tables too.")
def report(names: tuple[str, ...], directory: str, form: str | None, **options: Any) -> None:
    """Report what sweeps, runs and published tables found."""
    from cluster.experiments.report.report import report

    click.echo(report(names, directory, form=form or "text", **options))


@command
@click.argument("sweep", metavar="SWEEP")
@directory
@click.option("--batch", type=click.IntRange(min=1), metavar="B", help="The global batch.")
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="The workers; they choose the batch."
)
@click.option("--deadline", metavar="T", help="The longest that training may take: 90s, 45m, 12h or 3d.")
@click.option("--budget", type=click.FloatRange(min=1), metavar="EXAMPLES", help="The most examples.")
@click.option("--arm", metavar="ARM", help="An arm of the sweep; else the fastest.")
@click.option("--prior", metavar="NAME", help="A table of `report --reference mlperf` to believe beforehand.")
def recommend(sweep: str, directory: str, **wish: Any) -> None:
    """Recommend a recipe for another batch, from what a sweep found."""
    from cluster.experiments.recommend import advice

    click.echo(advice(sweep, directory, **wish))


@command
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
def sync(run: Path) -> None:
    """Bring to MLflow what it has not got of the folder of a run or a sweep."""
    from cluster import driver

    click.echo(driver.sync(run))


head = click.option("--address", metavar="URL", help="The head's dashboard; else http://127.0.0.1:8265.")
job = click.argument("job", metavar="JOB")


@command
@recipe
@overrides
@head
def submit(recipe: str, overrides: tuple[str, ...], address: str | None) -> None:
    """Train a recipe as a job on a running Ray cluster."""
    from cluster import jobs

    name = jobs.submit(recipe, overrides, address, lambda text: click.echo(text, err=True))
    click.echo(f"{name}\nfollow it with `lockstep logs {name} -f`, end it with `lockstep stop {name}`")


@command
@click.argument("job", metavar="[JOB]", required=False)
@head
def status(job: str | None, address: str | None) -> None:
    """Show a cluster's jobs, or one of them."""
    from cluster import jobs

    click.echo(jobs.status(job, address) if job else "\n".join(jobs.statuses(address)))


@command
@job
@click.option("-f", "--follow", is_flag=True, help="Until the job ends.")
@head
def logs(job: str, follow: bool, address: str | None) -> None:
    """Show what a job has written."""
    from cluster import jobs

    for piece in jobs.follow_logs(job, address) if follow else [jobs.logs(job, address)]:
        click.echo(piece, nl=False)


@command
@job
@head
def stop(job: str, address: str | None) -> None:
    """Stop a job; its run is marked and can be resumed."""
    from cluster import jobs

    click.echo(jobs.stop(job, address))


def main() -> None:
    """The entry point of `lockstep` and of `python -m cluster.cli`."""
    from cluster.reach import reach_loopback_directly

    reach_loopback_directly()
    lockstep(prog_name="lockstep")


if __name__ == "__main__":
    main()

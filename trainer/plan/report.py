"""The plan as lines for the screen: one aligned line per question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.plan.plan import Plan
from trainer.recipe.messages import in_bytes
from trainer.task import SPLITS

Row = tuple[str, str]  # question, answer


def lines(plan: Plan, more: Sequence[Row] = ()) -> list[str]:
    """The plan, and `more` rows after its own."""
    rows = [*_model(plan), *_batch(plan), *_rate(plan), *_data(plan), *_computation(plan), *more]
    width = max(len(title) for title, _ in rows)
    return [f"{title:<{width}}  {text}" for title, text in rows]


def _model(plan: Plan) -> list[Row]:
    recipe = plan.recipe
    held, state = in_bytes(4 * plan.parameters), in_bytes(plan.state_bytes)
    sizes = f"{held} of weights, {state} of {recipe.optimizer.name} state"
    return [
        ("run", f"{recipe.name}: {recipe.task.use}, seed {recipe.seed}"),
        ("model", f"{plan.parameters:,} parameters: {sizes}"),
    ]


def _batch(plan: Plan) -> list[Row]:
    batch, run = plan.recipe.batch, plan.recipe.run
    is_fixed = run.fewest_workers == run.most_workers
    workers = f"{run.most_workers}" if is_fixed else f"{run.fewest_workers} to {run.most_workers}"
    of_them = "the busiest" if is_fixed else f"the busiest of {run.most_workers}"
    parts = f"{plan.micro_batches} micro-batches of {batch.micro} from {batch.lanes} lanes"
    busiest = "" if batch.growth else f"; {of_them} computes {plan.busiest_worker():.0%} of each step"
    rows = [
        ("batch", f"{batch.size:,} = {parts}"),
        ("workers", f"{workers} of at most {plan.largest_workers}{busiest}"),
    ]
    if batch.growth:
        stages = ", ".join(_stage(plan, stage) for stage in _few(plan.stages.stages))
        rows.append(("batch growth", f"{stages}: of each step, by the busiest worker"))
    return rows


def _stage(plan: Plan, stage: Any) -> str:
    """A stage of a growing batch, or the sign for those that are left out."""
    if isinstance(stage, str):
        return stage
    return f"{stage.batch_size:,} from {stage.start:,} on ({plan.busiest_worker(stage.batch_size):.0%})"


def _rate(plan: Plan) -> list[Row]:
    schedule = plan.recipe.schedule
    scale, warmup, cooldown = schedule.scale, schedule.warmup, schedule.cooldown
    base = f"{plan.recipe.optimizer.hyper['lr']:g}"
    scaled = f" = {base} scaled from batch {scale.base_batch} by rule {scale.rule}"
    rule = "" if scale.rule == "none" else scaled
    up = f"{warmup.shape} over {plan.warmup_examples:,} examples ({warmup})" if warmup else "none"
    down = f", {cooldown.shape} cool-down over the last {cooldown}" if cooldown else ""
    epochs = plan.served_examples / plan.examples["train"]
    return [
        ("learning rate", f"{plan.peak_lr:.4g}{rule}"),
        ("warm-up", up),
        ("decay", f"{schedule.decay.shape}{down}"),
        ("steps", f"{plan.steps:,}, serving {plan.served_examples:,} examples ({epochs:.4g} epochs)"),
    ]


def _data(plan: Plan) -> list[Row]:
    echo = plan.recipe.echo
    passes = plan.fresh_examples / plan.examples["train"]
    factor = f"1 to {echo.cap:g}" if echo.factor == "auto" else f"{echo.factor:g}"
    middle = f"echo × {factor} (of {echo.capacity:,} examples)" if echo.largest > 1 else "no echo"
    most = "at most " if echo.factor == "auto" else ""
    path = ["pool: source, prepare", middle, "worker: augment, forward, backward"]
    if echo.at != "before_augment":
        path = ["pool: source, prepare", "worker: augment", middle, "forward, backward"]
    return [
        ("data", ", ".join(f"{plan.examples[split]:,} {split}" for split in SPLITS)),
        *[("left out", line) for line in plan.left_out],
        ("order", _order(plan)),
        ("fresh examples", f"{most}{plan.fresh_examples:,} ({passes:.4g} passes over the training data)"),
        ("pipeline", " → ".join(path)),
    ]


def _order(plan: Plan) -> str:
    """How a pass orders the rows, and what would read them at less cost."""
    shuffle, together = plan.recipe.batch.shuffle, plan.rows_together
    if shuffle.block > 1:
        among = f"{shuffle.window} blocks ({shuffle.block * shuffle.window:,} rows)"
        return f"blocks of {shuffle.block:,} rows permuted, rows shuffled among {among}"
    hint = f"; read by {together:,}: batch.shuffle.block {together} is cheaper" if together > 1 else ""
    return f"all rows permuted{hint}"


def _computation(plan: Plan) -> list[Row]:
    """How forward and backward passes are computed, where it is not as usual."""
    train, run, blocks = plan.recipe.train, plan.recipe.run, plan.checkpointed_blocks
    ways = {
        f"{train.precision} autocast": train.precision != "fp32",
        "a loss scale": train.precision == "fp16",
        "compiled": run.compile,
        "channels last": run.channels_last,
        f"activations of {len(blocks)} blocks recomputed ({', '.join(_few(blocks))})": bool(blocks),
    }
    said = [way for way, is_so in ways.items() if is_so]
    return [("computation", ", ".join(said))] if said else []


def _few(items: Sequence[Any]) -> Sequence[Any]:
    """All of a few items; of many the first two and the last."""
    return items if len(items) <= 4 else [*items[:2], "…", items[-1]]

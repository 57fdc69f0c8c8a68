"""The loop: one step after another, each yielded to whoever iterates: who evaluates, logs, saves, stops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.compute.autotune import is_out_of_memory
from trainer.compute.step_timer import StepTimer
from trainer.errors import RunFailed
from trainer.training import Training


class NotFinite(RunFailed):
    """A loss or a gradient is not finite, on all workers in the same step; the weights are those before
    it.
    """


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `examples` counts from the start of the run, this step included; so do the
    updates `skipped` because they were not finite.
    """

    step: int
    examples: int
    batch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    loss_scale: float
    skipped: int
    seconds: dict[str, float] = field(default_factory=dict)  # wait, compute, communication, optimizer


def steps(run: Training) -> Iterator[Step]:
    """Train from where `run` stands to the end of its plan, one yield per optimizer step.

    Raises:
        NotFinite: a loss or a gradient is not, and the recipe's guard does not skip it.
        RunFailed: something went wrong on one of the workers.
    """
    progress, plan, micro = run.progress, run.plan, run.recipe.batch.micro
    watch = StepTimer(run.group.device)
    while not run.finished:
        watch.start()
        waited_s = run.loader.waited_s
        micro_batches = plan.micro_batches_at(progress.examples)
        batch = micro_batches * micro
        rate = run.rate.rate(progress.examples, batch) * run.rate_factor()

        run.optimizer.zero_grad()
        run.reduction.begin()
        trouble = _accumulate(run, run.own_micro_batches(micro_batches))
        watch.lap("compute")
        sums = run.reduction.finish()
        watch.lap("communication")

        scale = run.scale.value
        loss, norm = _mean_gradient(run, sums)
        if not math.isfinite(loss) and _starts_over(run, trouble):
            continue
        if math.isfinite(loss) and math.isfinite(norm):
            for group in run.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_multiplier", 1.0)
            run.optimizer.step()
            run.norms.move(sums[2:], pace=micro_batches / plan.micro_batches)
            run.scale.rise()
        elif not (math.isfinite(loss) and run.scale.fall()):
            _skip(run, loss, norm, sums[1].item())
        watch.lap("optimizer")

        progress.step += 1
        progress.position += micro_batches
        progress.examples += batch
        if run.average is not None:
            run.average.update(run, batch)
        seconds = watch.seconds(of_compute={"wait": run.loader.waited_s - waited_s})
        skipped = progress.skipped + run.scale.skipped
        yield Step(progress.step, progress.examples, batch, loss, rate, norm, scale, skipped, seconds)


def _accumulate(run: Training, micro_batches: list[int]) -> Exception | None:
    """Add up the gradients of this worker's micro-batches.

    What goes wrong here goes wrong on one worker alone, while the others wait for its gradients. So it is
    returned, and a sum that is not finite carries the news: all of them stop in the same step.
    """
    chunks = list(run.passes.chunks(micro_batches))
    try:
        for chunk in chunks:
            examples = run.passes.load(chunk)
            if chunk is chunks[-1]:
                run.reduction.expect_last()
            run.reduction.add(run.passes.backward(chunk, examples))
    except Exception as error:
        run.reduction.add(torch.full_like(run.passes.statistics, torch.nan))
        if is_out_of_memory(error):  # which itself would hold on to what was computed before it
            return torch.OutOfMemoryError(f"{error}; lower batch.micro or set run.recompute")
        return error
    return None


def _starts_over(run: Training, trouble: Exception | None) -> bool:
    """Whether the step is to be tried again with less memory, as all workers see it. RunFailed if one of
    them failed otherwise.
    """
    execution = run.passes.execution
    if execution.stack > 1 and any(run.group.all_gather(isinstance(trouble, torch.OutOfMemoryError))):
        run.passes.execution = execution.with_less_memory()
        run.rewind_loader()
        return True
    if (reason := run.group.first_failure(trouble)) is not None:
        raise RunFailed(f"{_where(run)}: {reason}") from trouble
    return False


@torch.no_grad()
def _mean_gradient(run: Training, sums: Tensor) -> tuple[float, float]:
    """Turn the summed gradient of the scaled loss into that of the mean loss, clipped if the recipe says so;
    return the loss and the norm before clipping.
    """
    gradients: list[Tensor] = run.optimizer.flat.gradients  # type: ignore[attr-defined]
    squares = torch.stack([gradient.dot(gradient) for gradient in gradients])
    total, count, *squared = torch.cat([sums[:2], squares]).tolist()  # the step's one wait for a GPU
    count = count or math.nan  # that no example counted is told by whoever sees what is not finite
    share = 1 / (count * run.scale.value)
    norm = math.sqrt(sum(squared)) * share
    clip_norm = run.recipe.train.clip_norm
    if clip_norm is not None and norm > clip_norm:
        share *= clip_norm / norm
    for gradient in gradients:
        gradient.mul_(share)
    return total / count, norm


def _skip(run: Training, loss: float, norm: float, count: float) -> None:
    """Leave this step's update out, if the recipe's guard says so and has not done it too often; raise
    otherwise.
    """
    guard, progress = run.recipe.train.guard, run.progress
    if guard.policy == "skip" and progress.skipped < guard.most:
        progress.skipped += 1
        return
    if count == 0:
        what = "the loss counted no example in the whole batch; task.loss must return a count above 0"
    else:
        what = (
            f"the loss is {loss} and the gradient norm {norm}, computed in {run.recipe.train.precision} with "
            f"loss scale {run.scale.value:g}; the weights are those before this step. Look for bad values in "
            "the data, lower optimizer.lr, lengthen schedule.warmup or set train.clip_norm"
        )
    raise NotFinite(f"{_where(run)}: {what}")


def _where(run: Training) -> str:
    return f"step {run.progress.step + 1}, after {run.progress.examples} examples"

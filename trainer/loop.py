"""The loop: one step after another, each yielded to its caller, who evaluates, logs, saves, stops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.compute.execution import is_out_of_memory
from trainer.compute.forward_backward import stacks
from trainer.compute.step_timer import StepTimer
from trainer.errors import RunFailed, trace_of
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
    stop_asked: bool = False  # somebody wants the run to end here, as all workers see it
    seconds: dict[str, float] = field(default_factory=dict)  # wait, compute, communication, optimizer

    @property
    def total_s(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())

    @property
    def busy_s(self) -> float:
        """Seconds of the step without waiting for examples."""
        return self.total_s - self.seconds.get("wait", 0.0)


def steps(training: Training) -> Iterator[Step]:
    """Train from where `training` stands to the end of its plan, one yield per optimizer step.

    Raises:
        NotFinite: a loss or a gradient is not, and the recipe's guard does not skip it.
        RunFailed: something went wrong on one of the workers.
    """
    progress, plan, micro = training.progress, training.plan, training.recipe.batch.micro
    timer = StepTimer(training.group.device)
    while not training.finished:
        timer.start()
        waited_s = training.loader.waited_s
        micro_batches = plan.micro_batches_at(progress.examples)
        batch = micro_batches * micro
        rate = training.rate.rate(progress.examples, batch) * training.rate_factor()

        training.optimizer.zero_grad()
        training.reduction.begin()
        failure = _accumulate(training, micro_batches)
        if training.stop_asked():
            training.reduction.add(_vote(training))
        timer.lap("compute")
        sums, squares = training.reduction.finish()
        timer.lap("communication")

        scale = training.loss_scale.value
        loss, norm, votes = _mean_gradient(training, sums, squares)
        if not math.isfinite(loss) and _repeats_with_less_memory(training, failure):
            continue
        if math.isfinite(loss) and math.isfinite(norm):
            for group in training.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_multiplier", 1.0)
            training.optimizer.step()
            training.norms.move(sums[2:-1], pace=micro_batches / plan.micro_batches)
            training.loss_scale.rise()
        elif not (math.isfinite(loss) and training.loss_scale.fall()):
            _skip(training, loss, norm, sums[1].item())
        timer.lap("optimizer")

        progress.step += 1
        progress.position += micro_batches
        progress.examples += batch
        if training.average is not None:
            training.average.update(progress.examples, batch)
        seconds = timer.seconds(of_compute={"wait": training.loader.waited_s - waited_s})
        skipped = progress.skipped + training.loss_scale.skipped
        did = progress.step, progress.examples, batch, loss, rate, norm, scale, skipped
        yield Step(*did, stop_asked=votes > 0, seconds=seconds)


def _vote(training: Training) -> Tensor:
    """What adds one vote for stopping to the step's statistics: it travels to all workers with them."""
    vote = torch.zeros_like(training.forward_backward.statistics)
    vote[-1] = 1
    return vote


def _accumulate(training: Training, micro_batches: int) -> Exception | None:
    """Add up the gradients of this worker's part of the next `micro_batches`.

    What fails here fails on one worker alone, while the others wait for its gradients. So it is returned, and
    a sum that is not finite carries the news: all of them stop in the same step.
    """
    compute, execution, reduction = training.forward_backward, training.execution, training.reduction
    chunks, done, failure = list(stacks(training.own_micro_batches(micro_batches), execution)), 0, None
    in_pass = False
    try:
        for chunk in chunks:
            examples = compute.load(chunk)
            reduction.begin_pass(chunk is chunks[-1])
            in_pass = True
            reduction.add(compute.backward(chunk, examples, execution))
            done, in_pass = done + 1, False
    except Exception as error:
        failure = _told(error)
        if in_pass and reduction.is_spread:  # a pass of all workers, who cannot go on without this one
            raise RunFailed(f"{_where(training)}: {failure}", trace_of(error)) from error
        reduction.add(torch.full_like(compute.statistics, torch.nan))
    for _ in range(training.passes(micro_batches) - done if reduction.is_spread else 0):
        chunk, examples = compute.spare(training.progress.position)
        reduction.begin_pass(False)
        compute.backward(chunk, examples, execution, weight=0.0)
    return failure


def _told(error: Exception) -> Exception:
    """What went wrong in a pass, with advice where memory ran out: that error itself would hold on to what
    was computed before it.
    """
    if is_out_of_memory(error):
        return torch.OutOfMemoryError(f"{error}; lower batch.micro or set run.recompute")
    return error


def _repeats_with_less_memory(training: Training, failure: Exception | None) -> bool:
    """Whether the step is to be done again with less memory, as all workers see it.

    Raises:
        RunFailed: one of them failed for another reason.
    """
    group = training.group
    if training.execution.stack > 1 and any(group.all_gather(isinstance(failure, torch.OutOfMemoryError))):
        training.with_less_memory()
        return True
    if (told := group.first_failure(failure)) is not None:
        raise RunFailed(f"{_where(training)}: {told.reason}", told.trace) from failure
    return False


@torch.no_grad()
def _mean_gradient(training: Training, sums: Tensor, squares: Tensor) -> tuple[float, float, float]:
    """Turn the summed gradient of the scaled loss into that of the mean loss, clipped if the recipe says so;
    return the loss, the norm before clipping, and the votes for stopping.
    """
    total, count, votes, *squared = torch.cat(
        [sums[:2], sums[-1:], squares]
    ).tolist()  # the step's one wait for a GPU
    count = count or math.nan  # `_skip` tells that no example counted
    factor = 1 / (count * training.loss_scale.value)
    norm = math.sqrt(sum(squared)) * factor
    clip_norm = training.recipe.train.clip_norm
    if clip_norm is not None and norm > clip_norm:
        factor *= clip_norm / norm
    for gradient in training.reduction.gradients():
        gradient.mul_(factor)
    return total / count, norm, votes


def _skip(training: Training, loss: float, norm: float, count: float) -> None:
    """Leave this step's update out, if the recipe's guard says so and has not done it too often; raise
    otherwise.
    """
    guard, progress = training.recipe.train.guard, training.progress
    if guard.policy == "skip" and progress.skipped < guard.most:
        progress.skipped += 1
        return
    if count == 0:
        what = "the loss counted no example in the whole batch; task.loss must return a count above 0"
    else:
        precision, scale = training.recipe.train.precision, training.loss_scale.value
        what = (
            f"the loss is {loss} and the gradient norm {norm}, computed in {precision} with loss scale "
            f"{scale:g}; the weights are those before this step. Look for bad values in the data, lower "
            "optimizer.lr, lengthen schedule.warmup or set train.clip_norm"
        )
        if training.recipe.run.reduction == "exact":
            what += "; with run.reduction exact, sums beyond 2^82 count as not finite"
    raise NotFinite(f"{_where(training)}: {what}")


def _where(training: Training) -> str:
    return f"step {training.progress.step + 1}, after {training.progress.examples} examples"

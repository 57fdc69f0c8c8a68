"""A sweep of two optimizers on digits that takes seconds, and what of it is the same however it was run."""

SWEEP = """
name: tiny
recipe:
  name: base
  task: {use: trainer.tasks.digits:Digits, with: {hidden: 16}}
  batch: {size: 64, micro: 64, lanes: 4}
  optimizer: {name: momentum, lr: 0.2}
  train: {epochs: 30}
  run: {device: cpu}
target: {metric: loss, at_most: 0.6, evaluate: {growth: 1.1}}
batches: [32, 64, 256]
arms: {momentum: {}, lamb: {optimizer: {name: lamb, lr: 0.03}}}
seeds: {search: [101, 102], report: 2}
"""


def facts(study):
    """What is the same however often a sweep was cut off."""
    trials = {
        (t.key, t.stage): (t.rate, t.end, t.steps, t.trained_steps, t.curve, t.test) for t in study.trials
    }
    return trials, study.best

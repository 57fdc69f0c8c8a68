"""What a user's task raises or wrongly returns is told with the user's own file and line."""

import copy
import functools
import inspect
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data_echo import ArraySource, DataError, InlinePreparer, PrepareRequest
from tests.trainer.plans import planned, spec
from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import NoisyTask, recipe
from trainer.compute.evaluation import Evaluation
from trainer.distributed.group import WorkerGroup
from trainer.errors import RecipeError, RunFailed, TaskError
from trainer.plan import rehearsal
from trainer.run_folder import journal
from trainer.task_calls import checked
from trainer.worker import run_worker

HERE = r"tests/trainer/test_task_calls\.py"
ONE = torch.ones(())


class Returning(NoisyTask):
    """A task whose method returns a given value, or raises it."""

    def __init__(self, method: str, value: Any):
        super().__init__()
        self.method, self.value = method, value

    def given(self, method: str, usual: Any) -> Any:
        if method != self.method:
            return usual()
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value() if inspect.isfunction(self.value) else self.value

    def model(self):
        return self.given("model", super().model)

    def source(self, split):
        return self.given("source", lambda: super(Returning, self).source(split))

    def prepare(self, example, draw):
        return self.given("prepare", lambda: super(Returning, self).prepare(example, draw))

    def augment(self, batch, draw):
        return self.given("augment", lambda: super(Returning, self).augment(batch, draw))

    def loss(self, model, batch):
        return self.given("loss", lambda: super(Returning, self).loss(model, batch))

    def metrics(self, model, batch):
        return self.given("metrics", lambda: super(Returning, self).metrics(model, batch))


ARGUMENTS = {"model": 0, "source": 1, "prepare": 2, "augment": 2, "loss": 2, "metrics": 2}


def call(method: str, value: Any) -> Any:
    arguments: list[Any] = ["train"] if method == "source" else [None] * ARGUMENTS[method]
    return getattr(checked(Returning(method, value)), method)(*arguments)


def line_of(method: str) -> int:
    return inspect.getsourcelines(getattr(Returning, method))[1]


def complex_model() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    return model


WRONG = [
    ("model", None, "returned None", "return a torch.nn.Module"),
    ("model", lambda: nn.Linear, "returned the class Linear, not an instance", "return a torch.nn.Module"),
    ("model", lambda: nn.LazyLinear(3), "returned a model whose weight has no shape yet", "number of inputs"),
    ("model", complex_model, "returned a model whose weight is complex64", "real parameters"),
    ("model", lambda: nn.ReLU(), "returned a model without parameters", "can be trained"),
    ("source", None, "returned None", "source[number]"),
    ("source", lambda: iter([1]), "returned a list_iterator", "source[number]"),
    ("source", lambda: (n for n in range(3)), "returned a generator", "source[number]"),
    ("source", {"x": [1, 2]}, "returned a dict of 'x'", "source[number]"),
    ("source", "data/train", "returned a str", "source[number]"),
    ("source", lambda: ArraySource, "returned the class ArraySource, not an instance", "source[number]"),
    ("source", range(10**13), "returned", "at most"),
    ("prepare", None, "returned None", "dict of arrays or numbers"),
    ("prepare", {}, "returned a dict of 0", "dict of arrays or numbers"),
    ("prepare", np.zeros(3), "returned float64 [3]", "dict of arrays or numbers"),
    ("prepare", {"x": "a.jpg"}, "returned a str as 'x'", "dict of arrays or numbers"),
    ("prepare", {"x": [[1], [1, 2]]}, "returned a list of 2 as 'x'", "dict of arrays or numbers"),
    ("prepare", {"x": None}, "returned None as 'x'", "dict of arrays or numbers"),
    ("prepare", {3: 1.0}, "returned a dict with the key 3", "dict of arrays or numbers"),
    ("augment", None, "returned None", "example first"),
    ("augment", {"x": np.zeros(3)}, "returned float64 [3] as 'x'", "example first"),
    ("augment", {"x": torch.zeros(())}, "returned float32 [] as 'x'", "example first"),
    ("augment", (torch.zeros(3), torch.zeros(3)), "returned a tuple of 2", "example first"),
    ("loss", None, "returned None", "a sum and a count"),
    ("loss", ONE, "returned float32 []", "a sum and a count"),
    ("loss", torch.ones(2), "returned float32 [2]", "a sum and a count"),
    ("loss", (ONE,), "returned a tuple of 1", "a sum and a count"),
    ("loss", (torch.ones(4), ONE), "returned (float32 [4], float32 [])", "a sum and a count"),
    ("loss", (ONE * 1j, ONE), "returned (complex64 [], float32 [])", "a sum and a count"),
    ("loss", (ONE, "8"), "returned (float32 [], a str)", "a sum and a count"),
    ("loss", (0.5, 8), "returned a float as its sum", "floating-point tensor"),
    ("loss", (torch.ones((), dtype=torch.int64), 8), "returned int64 [] as its sum", "floating-point tensor"),
    ("loss", (ONE, 8), "returned a sum without a gradient", "without .item()"),
    ("metrics", None, "returned None", "for each name a sum and a count"),
    ("metrics", ONE, "returned float32 []", "for each name a sum and a count"),
    ("metrics", {"a": ONE}, "returned float32 [] as 'a'", "for each name a sum and a count"),
    ("metrics", {"a": (torch.ones(3), ONE)}, "returned (float32 [3], float32 []) as 'a'", "for each name"),
    ("metrics", {1: (ONE, ONE)}, "returned a dict with the key 1", "for each name a sum and a count"),
    ("metrics", {"a": (None, ONE)}, "returned (None, float32 []) as 'a'", "for each name a sum and a count"),
]


@pytest.mark.parametrize(("method", "value", "wrong", "right"), WRONG)
def test_a_wrong_return_says_what_it_is_what_is_wanted_and_where_it_comes_from(method, value, wrong, right):
    with pytest.raises(TaskError) as error:
        call(method, value)
    assert wrong in error.value.wrong or (wrong == "returned" and "length" in error.value.wrong)
    assert right in error.value.right
    assert re.search(rf"^{method}\(.*\) of Returning .* \({HERE}:{line_of(method)}\)$", error.value.wrong)


@pytest.mark.parametrize("method", ARGUMENTS)
@pytest.mark.parametrize(
    "raised", [KeyError("z"), StopIteration(), SystemExit(3), ValueError("a\nb"), TaskError("a", "b")]
)
def test_whatever_a_method_raises_is_told_with_the_line_that_raised_it(method, raised):
    with pytest.raises(TaskError) as error:
        call(method, raised)
    kind = type(raised).__name__
    line = inspect.getsourcelines(Returning.given)[1] + 4
    assert re.search(rf"^{method}\(.*\) of Returning raised {kind}.* \({HERE}:{line}\)$", error.value.wrong)
    assert "raise self.value" in error.value.trace
    travelled = pickle.loads(pickle.dumps(error.value))
    assert (str(travelled), travelled.trace) == (str(error.value), error.value.trace)


def test_a_method_with_other_arguments_is_told_where_it_begins():
    class Short(NoisyTask):
        def metrics(self, model):  # type: ignore[override]
            return {}

    line = inspect.getsourcelines(Short.metrics)[1]
    with pytest.raises(TaskError, match=rf"raised TypeError: .* takes 2 positional .*{HERE}:{line}\)"):
        checked(Short()).metrics(nn.Linear(1, 1), {})


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate")]
)
def test_lack_of_memory_stays_what_it_is(error):
    with pytest.raises(type(error)):
        call("loss", error)


def test_right_values_pass_and_metrics_lose_their_dimensions():
    leaf = torch.ones(1, requires_grad=True)
    assert call("loss", (leaf * 2, 3))[1] == 3
    assert call("metrics", {"a": (torch.ones(1), 2), "b": (np.float32(1), np.int64(3))})["a"][0].shape == ()
    assert call("prepare", {"x": [1, 2], "y": True, "z": torch.zeros(2), "c": np.complex64(1)})


def test_a_checked_task_is_its_task_otherwise():
    task = checked(NoisyTask(gain=3.0))
    assert task.gain == 3.0
    assert checked(task) is task
    assert pickle.loads(pickle.dumps(task)).gain == copy.deepcopy(task).gain == 3.0
    assert not hasattr(task, "nothing")


@pytest.mark.parametrize("value", [lambda: nn.LazyLinear(3), complex_model, None])
def test_a_wrong_model_is_one_problem_of_the_plan(value):
    with pytest.raises(RecipeError) as error:
        planned(recipe(), Returning("model", value))
    (problem,) = error.value.problems
    assert problem.key == "task"
    assert "model() of Returning returned" in problem.wrong


def test_a_preparer_names_the_example_and_the_line_of_prepare_and_of_the_source():
    class Rows:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {}["gone"]

        def origin(self, index):
            raise OSError("this too")

    few = np.arange(2)
    line = inspect.getsourcelines(Rows.__getitem__)[1] + 1
    for value, said in {
        "prepare": rf"train: example 0: prepare\(\) of Returning raised KeyError: 'z' \({HERE}:\d+\); ",
        "source": rf"train: example 0: KeyError: 'gone' \({HERE}:{line}\); ",
    }.items():
        task = checked(Returning(value, KeyError("z") if value == "prepare" else Rows()))
        preparer = InlinePreparer(task, 0)
        with pytest.raises(DataError, match=said) as error:
            preparer.collect(preparer.submit(PrepareRequest("train", np.zeros_like(few), few)))
        assert "Traceback" in pickle.loads(pickle.dumps(error.value)).trace


class BrokenMetrics(NoisyTask):
    def metrics(self, model, batch):
        return {"accuracy": (batch["z"].sum(), len(batch["y"]))}


@pytest.mark.parametrize("workers", [1, 2])
def test_metrics_that_fail_stop_the_run_before_its_first_step_with_the_line(
    process_group: ProcessGroup, tmp_path: Path, workers
):
    chosen = recipe(run={"workers": workers})
    outcomes = process_group.run(workers, run_worker, spec(chosen, tmp_path, BrokenMetrics))
    line = inspect.getsourcelines(BrokenMetrics.metrics)[1] + 1
    said = rf"trying validation: metrics\(\) of BrokenMetrics raised KeyError: 'z' \(.*{HERE}:{line}\); fix"
    assert all(re.match(said, outcome.reason) for outcome in outcomes)
    written = list(journal.read(tmp_path))
    assert re.match(said, written[-1]["reason"])
    assert 'batch["z"].sum()' in written[-1]["trace"]
    assert not [each for each in written if each["kind"] == "step"]


class Restless(nn.Module):
    """A model whose forward pass in evaluation moves a buffer, replaces another, and draws."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 5)
        self.layer.eval()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.latest = x.sum()[None] + torch.rand(1) + random.random() + np.random.random()
        return self.layer(x)


class RestlessTask(NoisyTask):
    def model(self):
        return Restless()


def test_trying_evaluation_leaves_generators_buffers_modes_and_the_order_alone():
    task, model = checked(RestlessTask()), Restless()
    buffers = dict(model.named_buffers())
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    evaluation = Evaluation(task, "validation", 203, 10, InlinePreparer(task, 0), WorkerGroup())
    assert evaluation.rehearse(model) == ["accuracy", "loss"]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    assert modes == [module.training for module in model.modules()]
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert not buffer.any()
    tried = evaluation.measure(model)
    fresh = Evaluation(task, "validation", 203, 10, InlinePreparer(task, 0), WorkerGroup())
    assert tried == fresh.measure(model)


@pytest.mark.parametrize("key", ["train.target", "checkpoint.best"])
def test_a_metric_that_is_not_measured_is_refused_by_check_and_before_the_first_step(tmp_path, key):
    section, name = key.split(".")
    told = {"metric": "acuracy", **({"at_least": 1.0} if name == "target" else {"mode": "max"})}
    chosen = recipe(**{section: {"epochs": 1, name: told} if section == "train" else {name: told}})
    plan = planned(chosen, NoisyTask())
    with pytest.raises(
        RecipeError, match=f"{key}.metric: is acuracy, .*accuracy, loss; did you mean accuracy?"
    ):
        rehearsal.rows(plan, checked(NoisyTask()))
    outcome = run_worker(spec(chosen, tmp_path, NoisyTask))
    assert outcome.status == "FAILED"
    assert f"{key}.metric: is acuracy" in str(outcome.reason)
    assert not [line for line in journal.read(tmp_path) if line["kind"] == "step"]


def test_check_shows_what_each_method_returns():
    rows = dict(rehearsal.rows(planned(recipe(), NoisyTask()), checked(NoisyTask())))
    assert "prepare: x float32 [4, 12], y int64 [4], id int64 [4], counts bool [4]" in rows["train"]
    assert "augment: x float32 [4, 12]" in rows["train"]
    assert "loss: (float32 [], int64 [])" in rows["train"]
    assert "metrics: accuracy (int64 [], int64 []), loss (float32 [], int64 [])" in rows["test"]


class Ragged(NoisyTask):
    def prepare(self, example, draw):
        return {**example, "x": np.zeros(3 + int(example["id"]) % 2, np.float32)}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            Ragged(),
            r"task: train: prepare: x: shapes \[\(3,\), \(4,\)\]; one shape for all \(pad ragged ones\)",
        ),
        (
            Returning("augment", None),
            rf"task: train: augment\(\) of Returning returned None \({HERE}:\d+\); it should",
        ),
        (BrokenMetrics(), rf"task: validation: metrics\(\) of BrokenMetrics raised KeyError: 'z' \({HERE}"),
        (Returning("loss", ONE), r"task: train: loss\(\) of Returning returned float32 \[\]"),
        (Returning("prepare", None), r"train: example 0: prepare\(\) of Returning returned None"),
    ],
    ids=["ragged", "augment", "metrics", "loss", "prepare"],
)
def test_check_refuses_what_would_stop_the_run_later(task, said):
    with pytest.raises(RecipeError, match=said):
        rehearsal.rows(planned(recipe(), task), checked(task))


def test_a_failure_keeps_its_traceback_on_its_way():
    travelled = pickle.loads(pickle.dumps(RunFailed("why", "Traceback: where")))
    assert (str(travelled), travelled.trace) == ("why", "Traceback: where")


def test_checks_of_a_step_cost_next_to_nothing():
    """Counted in calls of Python functions: nothing in them looks at the numbers of a tensor."""
    import sys

    leaf = torch.ones((), requires_grad=True)
    pair, batch = (leaf * 2, torch.tensor(3)), {"x": torch.zeros(3, 2), "y": torch.zeros(3)}
    calls: list[str] = []
    task = checked(functools.partial(_Constant, pair, batch)())
    sys.setprofile(lambda frame, event, argument: calls.append(getattr(argument, "__name__", event)))
    try:
        task.loss(None, batch)
        task.augment(batch, None)
    finally:
        sys.setprofile(None)
    assert len(calls) < 120
    assert not {"item", "tolist", "__bool__", "_local_scalar_dense", "cpu", "numpy"} & set(calls)


class _Constant:
    def __init__(self, pair, batch):
        self.pair, self.batch = pair, batch

    def loss(self, model, batch):
        return self.pair

    def augment(self, batch, draw):
        return self.batch

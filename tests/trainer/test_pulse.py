"""What another thread sees of one that trains."""

import threading
from collections.abc import Callable
from pathlib import Path

from tests.trainer.reproducibility import NoisyTask, ready
from tests.trainer.reproducibility import recipe as noisy
from trainer.distributed.pulse import Pulse, Report
from trainer.loop import steps

HERE = Path(__file__).name


def report_during(work: Callable[[Callable[[], None]], None]) -> Report:
    """The report while `work` calls what it is given, which waits there for the report to be taken."""
    is_there, may_go_on, made = threading.Event(), threading.Event(), []

    def pause() -> None:
        is_there.set()
        may_go_on.wait(60)

    def train() -> None:
        made.append(Pulse())
        work(pause)

    thread = threading.Thread(target=train)
    thread.start()
    assert is_there.wait(60)
    report = made[0].report()
    may_go_on.set()
    thread.join()
    return report


def test_the_line_of_the_users_code_is_named_within_a_step():
    class Pausing(NoisyTask):
        def loss(self, model, batch):
            self.pause()
            return super().loss(model, batch)

    def work(pause: Callable[[], None]) -> None:
        task = Pausing()
        task.pause = lambda: None
        training = ready(noisy(), task=task)
        task.pause = pause
        next(steps(training))

    report = report_during(work)
    assert report.in_step
    assert report.waits_for is None
    assert HERE in report.place


def pause_within(module: str, pause: Callable[[], None]) -> None:
    """Pause in a function of a module that a step has called."""
    inner = {"__name__": module, "pause": pause}
    exec("def work():\n    pause()", inner)
    loop = {"__name__": "trainer.loop", "work": inner["work"]}
    exec("def steps():\n    work()", loop)
    loop["steps"]()


def test_a_step_that_compiles_is_not_measured_by_those_before():
    def within(module: str) -> bool:
        return report_during(lambda pause: pause_within(module, pause)).in_step

    assert within("my_task")
    assert not within("torch._inductor.compile_fx")
    assert not within("torch._dynamo.convert_frame")


def test_outside_of_the_loop_it_is_in_no_step():
    report = report_during(lambda pause: pause())
    assert not report.in_step
    assert report.place.endswith("in pause")


def test_steps_and_their_longest_time_are_remembered():
    pulse = Pulse()
    assert pulse.report().longest_step_s is None
    for step, seconds in enumerate((0.5, 2.0, 1.0), start=1):
        pulse.stepped(step, seconds)
    assert (pulse.report().step, pulse.report().moves, pulse.report().longest_step_s) == (3, 3, 2.0)

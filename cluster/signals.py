"""Being told to stop: by Ctrl-C, by a process manager, by a terminal that closes."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NOTICE_S = 27.0  # from the first signal to the end: managers of machines and jobs give 30 s
SAVING_S = 15.0  # of these, for the step in progress and its checkpoint
SAME_PRESS_S = 1.0  # signals that come this close together are one: torchrun and terminals send several


class Interrupted(KeyboardInterrupt):
    """The command was told to stop, by Ctrl-C or by another signal that asks for it."""

    def __init__(self, number: int, began_at: float, reason: str = "") -> None:
        super().__init__(reason or f"interrupted by {signal.Signals(number).name}")
        self.number, self.began_at = number, began_at
        self.exit_code = 128 + number

    def because(self, reason: str) -> "Interrupted":
        """The same, said with more words."""
        return Interrupted(self.number, self.began_at, reason)


def left_s(interrupt: KeyboardInterrupt, at_most: float) -> float:
    """The seconds that are left for a clean-up after an interrupt; always a few."""
    began_at = getattr(interrupt, "began_at", time.monotonic())
    return max(2.0, min(at_most, NOTICE_S - (time.monotonic() - began_at)))


class Interruption:
    """The signals that ask a command to stop. `first` is the first one that came."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.first: Interrupted | None = None
        self.request: Callable[[Interrupted], bool] = lambda _: False
        """Asks what runs to end by itself, and says whether it will; it has `SAVING_S` for that."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """A signal came. Raises Interrupted where nothing ends by itself, or not soon enough."""
        if self.first is None:
            self.first = Interrupted(number, time.monotonic())
            if self.request(self.first):
                signal.setitimer(signal.ITIMER_REAL, SAVING_S)
                return
        elif number != signal.SIGALRM and time.monotonic() - self.first.began_at < SAME_PRESS_S:
            return
        self.ignore()
        raise self.first

    def ignore(self) -> None:
        """From here on, further signals change nothing: what is to be done for the end is being done."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each in (*self.NUMBERS, signal.SIGALRM):
            signal.signal(each, signal.SIG_IGN)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """SIGTERM and SIGHUP end the body as Ctrl-C does; once it is ending, further ones change nothing."""
    interruption = Interruption()
    numbers = (*Interruption.NUMBERS, signal.SIGALRM)
    before = {number: signal.signal(number, interruption.handle) for number in numbers}
    try:
        yield interruption
    finally:
        if interruption.first is not None:
            interruption.ignore()  # to the end of the process, which is near
        else:
            for number, handler in before.items():
                signal.signal(number, handler)

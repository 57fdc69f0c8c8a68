"""However a test ends, the commands that it started end with it."""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.cluster.commands import Command


@pytest.fixture(autouse=True)
def no_command_is_left() -> Iterator[None]:
    """Kill what still runs after a test, with all of its group."""
    yield
    for command in Command.started:
        if command.process.poll() is None:
            os.killpg(command.process.pid, signal.SIGKILL)
            command.process.wait()
    Command.started.clear()

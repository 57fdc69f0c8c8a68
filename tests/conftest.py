"""Fixtures that several packages' tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.trainer.process_group import ProcessGroup


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data next to the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the CIFAR-10 and tiny Shakespeare files in ../shared/data, which are not here")
    return folder


@pytest.fixture(scope="session")
def process_group() -> Iterator["ProcessGroup"]:
    """Three processes that form groups of one, two or three workers."""
    from tests.trainer.process_group import ProcessGroup

    processes = ProcessGroup(3)
    yield processes
    processes.close()

"""Settings of the property-based tests, and a temporary cache for indices of shards."""

from pathlib import Path

import pytest
from hypothesis import settings

# On a busy machine the time of an example says nothing.
settings.register_profile("data_echo", deadline=None, max_examples=40)
settings.load_profile("data_echo")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shards' indices during the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lockstep" / "shards"

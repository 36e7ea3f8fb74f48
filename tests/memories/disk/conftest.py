"""The store that the tests here share, and its clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.memory_store import Clock, open_store
from vllm_armt.memories.disk.store import Store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    return open_store(tmp_path / "memories", clock=clock, grace=0)

"""Small models for the tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.memories import Made
from tests.support.small_hf import Small


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A function from a kind of model to its directory, which lies in a folder of its own."""

    def make(kind: Small) -> Path:
        directory = tmp_path_factory.mktemp("small") / "model"
        kind.build().save_pretrained(directory)
        return directory

    return make

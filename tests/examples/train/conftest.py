"""A recipe of seconds: a model of two small layers, a text that means nothing, and stories."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer

from examples.train.fresh import make_fresh
from examples.train.recipe import Fresh, Recipe
from tests.support.texts import sentences
from tests.support.tiny_recipe import FRESH, STAGE
from vllm_armt.babilong import Background


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("background")
    for i, part in enumerate(("train", "validation", "test")):
        (directory / part).mkdir()
        (directory / part / "book.txt").write_text(sentences(Random(i), 400))
    return directory


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, books: Path) -> Path:
    """A model made from nothing, with its tokenizer."""
    return make_fresh(Fresh(**FRESH), tmp_path_factory.mktemp("fresh") / "model", 32, books, seed=1)


@pytest.fixture(scope="session")
def tokenizer(start):
    return AutoTokenizer.from_pretrained(start)


@pytest.fixture(scope="session")
def background(tokenizer, books):
    return Background.of_directory(books / "train", tokenizer)


@pytest.fixture
def recipe(start: Path, books: Path, tmp_path: Path):
    """A recipe with one stage, or with what is given in its place."""

    def recipe(stage: dict[str, Any] | None = None, **given: Any) -> Recipe:
        common = {"model": start, "background": books, "output": tmp_path / "run"}
        judged = {"segments": [1, 2], "questions": 20, "facts": 2}
        return Recipe(**common | {"stages": [STAGE | (stage or {})], "validation": judged} | given)

    return recipe

"""A recipe of seconds: a model of two small layers, a text that means nothing, and stories."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer

from examples.train.fresh import make_fresh
from examples.train.recipe import Fresh, Recipe, Stage
from tests.babilong.texts import sentences
from vllm_armt.babilong import Background

FRESH: dict[str, Any] = {
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layers": 2,
    "heads": 2,
    "num_mem_tokens": 3,
}
TRAINING = {"learning_rate": 1e-3, "logging_steps": 2, "save_steps": 2}
LEVELS = [
    {"segments": 1, "facts": [1, 3], "questions": [1, 2], "last": 2},
    {"segments": 4, "facts": [0.5, 2], "questions": [0.5, 1], "last": 2},
]
STAGE: dict[str, Any] = {
    "name": "first",
    "segment_size": 32,
    "levels": LEVELS,
    "max_steps": 6,
    "tasks": {"qa1": 1.0},
    "tokens_per_step": 256,
    "patience": 2,
    "advance": -1.0,
    "hold": 0.3,
    "cut": 0.3,
    "mentions": 2.0,
    "training": TRAINING,
}


def stage(**given) -> Stage:
    return Stage(**STAGE | {"mentions": 0.0} | given)


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

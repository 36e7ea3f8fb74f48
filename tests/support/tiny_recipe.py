"""A recipe of seconds: a model of two small layers, a text that means nothing, and stories."""

from __future__ import annotations

from typing import Any

from examples.train.recipe import Stage

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

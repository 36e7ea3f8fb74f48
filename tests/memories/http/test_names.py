"""Memories as models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_armt.memories.errors import InvalidInput
from vllm_armt.memories.http.names import Names

NAMES = Names(["armt", "org/armt:7b"])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (None, (None, None)),
        ("armt", ("armt", None)),
        ("armt:book", ("armt", "book")),
        ("org/armt:7b", ("org/armt:7b", None)),
        ("org/armt:7b:book", ("org/armt:7b", "book")),
        ("other:book", ("other:book", None)),
        ("armt-large", ("armt-large", None)),
    ],
)
def test_a_name_stands_for_a_model_and_perhaps_a_memory(model, expected):
    assert NAMES.split(model) == expected


def test_a_request_asks_for_one_memory():
    request = SimpleNamespace(model="armt:book", vllm_xargs={"memory": "book", "other": 1})
    NAMES.resolve(request)
    assert (request.model, request.vllm_xargs) == ("armt", {"memory": "book", "other": 1})
    with pytest.raises(InvalidInput, match="Name one"):
        NAMES.resolve(SimpleNamespace(model="armt:book", vllm_xargs={"memory": "letters"}))

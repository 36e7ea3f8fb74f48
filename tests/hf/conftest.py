"""Models for the tests of the transformers code: the goldens, and small random ones whose memory matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.small_hf import KINDS, Small, by_name, tiny_base
from vllm_armt.hf import ARMTForCausalLM, RecurrentForCausalLM


@pytest.fixture(scope="session")
def load(golden_directory) -> Callable[..., RecurrentForCausalLM]:
    """The model of a golden, with the given fields of its configuration changed."""
    return lambda golden, **fields: AutoModelForCausalLM.from_pretrained(golden_directory(golden, **fields)).eval()


@pytest.fixture
def base() -> PreTrainedModel:
    """A tiny Llama with random weights, tied."""
    return tiny_base("llama")


@pytest.fixture(params=KINDS, ids=by_name)
def model(request: pytest.FixtureRequest) -> RecurrentForCausalLM:
    """A small model of every kind in turn."""
    return request.param.build()


@pytest.fixture
def armt() -> ARMTForCausalLM:
    """A small ARMT around a Llama."""
    return Small("armt", "llama").build()

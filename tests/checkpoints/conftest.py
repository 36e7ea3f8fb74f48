"""Research checkpoints of every system as fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.research_checkpoint import Case


@pytest.fixture
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return lambda name: Case(name, tmp_path_factory.mktemp(name))


@pytest.fixture
def tied(make_case: Callable[[str], Case]) -> Case:
    """Spelled by `safetensors.torch.save_model`: layers once, the tied embedding as lm_head."""
    return make_case("armt_llama_gqa_tied")


@pytest.fixture
def untied(make_case: Callable[[str], Case]) -> Case:
    return make_case("armt_llama_untied")


@pytest.fixture
def lora(make_case: Callable[[str], Case]) -> Case:
    return make_case("armt_llama_lora")


@pytest.fixture
def gpt2(make_case: Callable[[str], Case]) -> Case:
    """ARMT v1 with learned positions of its memory tokens."""
    return make_case("armt_gpt2_wrap")


@pytest.fixture
def prmt(make_case: Callable[[str], Case]) -> Case:
    return make_case("prmt_gpt2_wrap")


@pytest.fixture
def rmt(make_case: Callable[[str], Case]) -> Case:
    return make_case("rmt_llama")

"""Models for the tests of the transformers code: the goldens, and a fresh tiny one whose memory matters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from golden_cases import ROOT, Golden
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_armt.checkpoints import WrapperArgs, convert
from vllm_armt.hf import ARMTForCausalLM


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Golden], ARMTForCausalLM]:
    """The model of a golden; research checkpoints pass through the converter."""

    @cache
    def directory(golden: Golden) -> Path:
        if golden.is_hf:
            return golden.path
        dst = tmp_path_factory.mktemp("converted") / golden.name
        args = WrapperArgs.resolve(golden.path / "armt_args.json")
        convert(golden.path, dst, golden.path / "base_config", args)
        return dst

    return lambda golden: ARMTForCausalLM.from_pretrained(directory(golden)).eval()


@pytest.fixture
def base() -> PreTrainedModel:
    """A tiny Llama with random weights, tied."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "armt_llama_gqa_tied" / "base_config")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def armt(base: PreTrainedModel) -> ARMTForCausalLM:
    """A fresh ARMT with S = 8 and m = 3, its W_mv drawn so that the memory changes the logits."""
    model = ARMTForCausalLM.from_base(base, segment_size=8, num_mem_tokens=3, d_mem=4)
    for layer in model.model.model.layers:
        torch.nn.init.normal_(layer.W_mv.weight, std=0.5)
    return model.eval()

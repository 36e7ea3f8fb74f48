"""A model that is not ours is served by vLLM alone, with the plugin installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.platforms import current_platform

from tests.support.golden_cases import relative_l2

ROOT = Path(__file__).parents[2]
PROMPT = list(range(3, 150))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=192,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def report(llama, tmp_path_factory) -> dict:
    """What a process that serves it found; one of its own, where no test imported our modules."""
    directory = tmp_path_factory.mktemp("plain")
    llama.save_pretrained(directory)
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.serve_plain_llama", str(directory), json.dumps(PROMPT)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.partition("REPORT ")[2])


def test_the_plugin_is_loaded(report):
    assert "vllm_armt.integration.hooks" in report["modules"]


def test_its_outputs_are_those_of_transformers(report, llama):
    with torch.no_grad():
        expected = llama(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    assert relative_l2(torch.tensor(report["log_probs"]), expected) < 1e-4


def test_its_scheduler_worker_and_block_size_are_vllms(report):
    assert report["scheduler"].startswith("vllm.v1.")
    assert report["worker"].startswith("vllm.v1.")
    if current_platform.is_cpu():
        assert report["block_size"] == 128


@pytest.mark.parametrize(
    "room", ["attention", "checkpoints", "executor", "hf", "linear", "models", "plan", "recurrence"]
)
def test_nothing_that_only_our_models_need_is_imported(report, room):
    assert not [name for name in report["modules"] if name.startswith(f"vllm_armt.{room}")]


@pytest.mark.parametrize("module", ["builder", "cache", "scheduler", "worker"])
def test_no_hook_into_vllm_that_only_our_models_need_is_imported(report, module):
    assert not [name for name in report["modules"] if name.startswith(f"vllm_armt.integration.{module}")]

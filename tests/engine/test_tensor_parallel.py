"""Two tensor-parallel ranks compute what the authors' code computes on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.utils.network_utils import get_open_port

from tests.support.engines import centred
from tests.support.golden_cases import Golden, relative_l2

ROOT = Path(__file__).parents[2]
NAMES = ["armt_hf_llama_nodenom", "armt_hf_gpt_neox", "armt_sw_llama", "prmt_gpt2_wrap", "rmt_llama"]
"""Key-value heads are split over the ranks where there are two, and replicated where there is one."""


@pytest.fixture(scope="module")
def computed(golden_directory, tmp_path_factory) -> dict[str, Any]:
    """What two processes compute of all goldens, one engine after another."""
    file = tmp_path_factory.mktemp("ranks") / "computed.pt"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.support.two_ranks"]
    cases = [f"{golden_directory(Golden(name))}={name}={get_open_port()}" for name in NAMES]
    run = subprocess.run(
        [sys.executable, *launch, str(file), *cases],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_agree_with_the_golden(name: str, computed: dict[str, Any]):
    golden, found = Golden(name), computed[name]
    for i, prompt in enumerate(golden.prompts):
        if len(prompt) > 1:
            error = relative_l2(centred(found["read"][i]), centred(golden.logits(i)[:-1]))
            assert error <= golden.tolerance(i), f"prompt {i}"
    for i, tokens, decoded in zip(golden.generations, found["tokens"], found["decoded"], strict=True):
        assert tokens == golden.tensors[f"gen_tokens.{i}"].tolist()
        error = relative_l2(centred(decoded), centred(golden.tensors[f"gen_logits.{i}"]))
        assert error <= golden.tolerance(i), f"generation {i}"

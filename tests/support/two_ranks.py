"""Two tensor-parallel ranks, started once, compute one golden after another.

Run by `torchrun --nproc-per-node 2 -m tests.support.two_ranks OUTPUT DIRECTORY=GOLDEN=PORT ...`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.engines import decoded_log_probs, engine, generate, greedy, prompt_log_probs
from tests.support.golden_cases import Golden

PARALLEL: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}


def computed(directory: Path, golden: Golden) -> dict[str, list]:
    """Log-probabilities of the golden's prompts, and tokens and log-probabilities of its generations."""
    with engine(directory, **PARALLEL) as llm:
        read = generate(llm, golden.prompts, greedy(1, prompt_logprobs=-1))
        params = [greedy(len(golden.tensors[f"gen_tokens.{i}"])) for i in golden.generations]
        decoded = generate(llm, [golden.prompts[i] for i in golden.generations], params)
    return {
        "read": [prompt_log_probs(output) if len(output.prompt_token_ids) > 1 else None for output in read],
        "tokens": [list(output.outputs[0].token_ids) for output in decoded],
        "decoded": [decoded_log_probs(output) for output in decoded],
    }


if __name__ == "__main__":
    output, *cases = sys.argv[1:]
    results = {}
    # an engine ends the ranks' group with what it left at the place where they met: the next one meets elsewhere
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for case in cases:
        directory, name, os.environ["MASTER_PORT"] = case.split("=")
        results[name] = computed(Path(directory), Golden(name))
    if os.environ["RANK"] == "0":
        torch.save(results, output)

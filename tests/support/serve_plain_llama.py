"""Serves a model that is not ours and prints, as JSON, what the plugin could have changed: `python FILE DIRECTORY`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.engines import engine, generate, greedy, prompt_log_probs, scheduler_of


def report(directory: Path, prompt: list[int]) -> dict:
    """What the engine is made of, and the log-probabilities of `prompt`."""
    with engine(directory, enforce_eager=True) as llm:
        (output,) = generate(llm, [prompt], greedy(1, prompt_logprobs=-1))
        config = llm.llm_engine.vllm_config
        return {
            "scheduler": type(scheduler_of(llm)).__module__,
            "block_size": config.cache_config.block_size,
            "worker": config.parallel_config.worker_cls,
            "log_probs": prompt_log_probs(output).tolist(),
            "modules": sorted(name for name in sys.modules if name.startswith("vllm_armt")),
        }


if __name__ == "__main__":
    print("REPORT", json.dumps(report(Path(sys.argv[1]), json.loads(sys.argv[2]))))

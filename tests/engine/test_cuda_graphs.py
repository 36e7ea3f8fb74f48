"""Through a whole engine, decoding steps come from graphs, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.support.cpu_graphs import CPUGraphs
from tests.support.engines import decoded_log_probs, engine, generate, greedy
from tests.support.golden_cases import relative_l2
from tests.support.small_model import GOLDEN, S, log_probs, random_prompts
from vllm_armt.executor.cuda_graphs import GraphedTails
from vllm_armt.executor.step import Step
from vllm_armt.models.recurrent import RecurrentForCausalLM


def test_steps_of_decodes_are_replayed_and_all_others_run(golden_directory, reference):
    prompts = random_prompts([5, 3 * S, 2 * S + 7])
    # the same attention as on devices that capture: it knows nothing of values
    with engine(golden_directory(GOLDEN), additional_config={"armt": {"attention": "sdpa"}}, max_num_seqs=3) as llm:
        (model,) = llm.apply_model(lambda model: model)
        assert isinstance(model, RecurrentForCausalLM)

        layers: Any = model.paged

        @contextmanager
        def restored() -> Iterator[None]:
            pools = [layer.kv_cache for layer in layers]
            before = [pool.clone() for pool in pools]
            yield
            torch._foreach_copy_(pools, before)

        capture = CPUGraphs(restored)
        model.graphed_tails = GraphedTails(model._run_tails, capture)
        run: list[bool] = []
        run_step = model._run

        def count(step: Step, inputs: torch.Tensor) -> torch.Tensor:
            run.append(step.wave is not None)
            return run_step(step, inputs)

        model._run = count  # type: ignore[method-assign]
        outputs = generate(llm, prompts, greedy(3 * S))
    for prompt, output in zip(prompts, outputs, strict=True):
        new = list(output.outputs[0].token_ids)
        expected = log_probs(reference, [*map(int, prompt), *new])[len(prompt) - 1 :]
        assert relative_l2(decoded_log_probs(output), expected) < 1e-4
    assert 2 <= capture.captured < capture.replayed
    # a prompt's whole segments are a wave, which no graph holds
    assert any(run)

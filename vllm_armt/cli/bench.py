"""`vllm-armt bench`: measurements of the engine on this machine, as ratios within one run."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vllm import LLM

app = typer.Typer(help="Measure the engine on this machine.", no_args_is_help=True)

MODES = ("sequential", "diagonal", "auto")

TOLERANCE = 0.1
"""Difference in a log-probability that bfloat16 explains."""

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "12x512": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8},
    "llama-160m": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
"""Base models by name; weights are random."""


@app.callback()
def bench() -> None:
    """Measure the engine on this machine."""


@dataclass(frozen=True)
class Case:
    """One setting: prompts of `tokens` tokens, `documents` of them at a time."""

    segment_size: int
    num_mem_tokens: int
    tokens: int
    documents: int


@app.command()
def schedule(
    shape: Annotated[str, typer.Option(help=f"Base model: {', '.join(SHAPES)}.")] = "12x512",
    segment_size: Annotated[str, typer.Option(help="S, several separated by commas.")] = "32,128,512",
    num_mem_tokens: Annotated[int | None, typer.Option(help="m. [default: S / 8]")] = None,
    d_mem: Annotated[int, typer.Option(help="Width of the memory's keys.")] = 64,
    tokens: Annotated[int, typer.Option(help="Length of a document.")] = 8192,
    documents: Annotated[str, typer.Option(help="Documents at a time, several separated by commas.")] = "1",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    repeat: Annotated[int, typer.Option(help="Repetitions; medians are reported.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every repetition to this file.")] = None,
    min_ratio: Annotated[float, typer.Option(help="Fail if diagonal over sequential is less.")] = 0.0,
) -> None:
    """Prefill throughput of the sequential, the diagonal and the chosen order of one engine."""
    if shape not in SHAPES:
        raise ValueError(f"--shape is {shape!r}; allowed: {', '.join(SHAPES)}.")
    results = []
    print(f"{shape}, {dtype}, d_mem {d_mem}, {tokens} tokens a document; tokens/s, median of {repeat}")
    print(f"{'S':>6} {'m':>4} {'docs':>5} " + "".join(f"{mode:>12}" for mode in MODES) + "  diag/seq  auto/best")
    for S in map(int, segment_size.split(",")):
        m = max(1, S // 8) if num_mem_tokens is None else num_mem_tokens
        with _engine(shape, S, m, d_mem, dtype) as llm:
            for count in map(int, documents.split(",")):
                case = Case(S, m, tokens, count)
                rates = _measure(llm, case, repeat)
                results.append({"case": asdict(case), "tokens_per_second": rates})
                median = {mode: statistics.median(rates[mode]) for mode in MODES}
                ratio = median["diagonal"] / median["sequential"]
                best = max(median["diagonal"], median["sequential"])
                print(
                    f"{S:>6} {m:>4} {count:>5} "
                    + "".join(f"{median[mode]:>12.0f}" for mode in MODES)
                    + f"{ratio:>10.2f}{median['auto'] / best:>11.2f}",
                    flush=True,
                )
                if ratio < min_ratio:
                    print(
                        f"diagonal over sequential is {ratio:.2f}, less than --min-ratio {min_ratio}", file=sys.stderr
                    )
                    raise typer.Exit(1)
    if json_file:
        json_file.write_text(json.dumps({"machine": _machine(), "shape": shape, "dtype": dtype, "results": results}))


@contextmanager
def _engine(shape: str, segment_size: int, num_mem_tokens: int, d_mem: int, dtype: str) -> Iterator[LLM]:
    """An in-process engine of random weights, so that its planner can be told another order between runs."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from transformers import LlamaConfig
    from vllm import LLM

    from vllm_armt.config import ARMTConfig

    base = LlamaConfig(vocab_size=32000, max_position_embeddings=8192, **SHAPES[shape])
    config = ARMTConfig(
        base_model_config=base,
        segment_size=segment_size,
        num_mem_tokens=num_mem_tokens,
        d_mem=d_mem,
        model_dtype=dtype,
        architectures=["ARMTForCausalLM"],
    )
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        llm = LLM(
            directory,
            load_format="dummy",
            dtype=dtype,  # type: ignore[arg-type]
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=64,
            max_num_batched_tokens=8192,
            kv_cache_memory_bytes=1 << 30,
        )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _measure(llm: LLM, case: Case, repeat: int) -> dict[str, list[float]]:
    """Tokens per second of every mode, interleaved; the first round warms up and is not counted.

    Raises:
        RuntimeError: two modes do not compute the same.
    """
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(repeat + 1):
        answers = []
        for mode in MODES:
            rate, answer = _run(llm, case, mode)
            rates[mode].append(rate)
            answers.append(answer)
        difference = max(abs(a - b) for answer in answers for a, b in zip(answer, answers[0], strict=True))
        if difference > TOLERANCE:
            raise RuntimeError(
                f"The modes disagree by {difference:.3g} in the log-probability of a prompt's last token."
            )
    return {mode: values[1:] for mode, values in rates.items()}


def _run(llm: LLM, case: Case, mode: str) -> tuple[float, list[float]]:
    """Tokens per second, and each prompt's log-probability of token 0 as the next one."""
    from vllm import SamplingParams

    _choose(llm, mode)
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompts: list[Any] = [
        {"prompt_token_ids": [(7 * i + 13 * j + i * j) % vocab for i in range(case.tokens)]}
        for j in range(case.documents)
    ]
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprob_token_ids=[0])
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    answers = [output.outputs[0].logprobs[0][0].logprob for output in outputs]  # type: ignore[index]
    return case.tokens * case.documents / seconds, answers


def _choose(llm: LLM, mode: str) -> None:
    core: Any = llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    planner = runner.attn_groups[0][0].metadata_builders[0].planner
    planner.schedule = replace(planner.schedule, mode=mode)


def _machine() -> dict[str, Any]:
    import torch
    import vllm

    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }

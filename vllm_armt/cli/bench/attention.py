"""`vllm-armt bench attention`: an ARMT against full attention, over lengths."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_armt.cli.bench import options
from vllm_armt.cli.values import whole_numbers

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine
    from vllm_armt.cli.bench.shapes import Model
    from vllm_armt.cli.bench.table import Row

Memory = Annotated[float, typer.Option(help="GiB of cache in which requests are counted.")]


def attention(
    shape: options.Shape = "llama-160m",
    model: options.ModelDirectory = None,
    dtype: options.Dtype = "bfloat16",
    segment_size: options.SegmentSize = None,
    num_mem_tokens: options.NumMemTokens = None,
    d_mem: options.DMem = None,
    tokens: options.Tokens = "1024,4096,16384,32768",
    new_tokens: options.NewTokens = 32,
    memory: Memory = 4.0,
    repeat: options.Repeat = 3,
    max_seconds: options.MaxSeconds = 60.0,
    step_tokens: options.StepTokens = None,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
    min_ratio: options.MinRatio = None,
) -> None:
    """Prefill, decoding and memory of an ARMT against vLLM's full attention on the base model.

    The segment size is 1024 unless given. The ratio is the base model's seconds over the ARMT's for reading
    a document. Both engines run with vLLM's defaults; within the first segment both must predict the same.
    """
    output = options.Output(json_file, plot_file, min_ratio)
    models = options.models(shape, model, dtype, segment_size, num_mem_tokens, d_mem, "1024")
    lengths = sorted(whole_numbers("--tokens", tokens))

    from vllm_armt.cli.bench.report import Report, rounds
    from vllm_armt.cli.bench.sides import both
    from vllm_armt.cli.bench.table import Chart, Column

    report = Report(
        "attention",
        f"{models[0].name}: ARMT against full attention; one request, {new_tokens} tokens decoded",
        [
            Column("dtype", "dtype"),
            Column("segment_size", "S"),
            Column("num_mem_tokens", "m"),
            Column("tokens", "tokens"),
            Column("armt_prefill_seconds", "ARMT s", ".3f"),
            Column("base_prefill_seconds", "base s", ".3f"),
            Column("base_over_armt", "base / ARMT", ".2f"),
            Column("armt_decode_ms", "ARMT ms/token", ".2f"),
            Column("base_decode_ms", "base ms/token", ".2f"),
            Column("armt_megabytes", "ARMT MB held", ",.1f"),
            Column("base_megabytes", "base MB held", ",.1f"),
            Column("armt_requests", f"ARMT requests in {memory:g} GiB", ","),
            Column("base_requests", f"base requests in {memory:g} GiB", ","),
        ],
        Chart(
            "tokens",
            {"armt_prefill_seconds": "ARMT", "base_prefill_seconds": "full attention"},
            "seconds to the first token",
            ("dtype", "segment_size"),
        ),
    )
    longest = {"max_model_len": lengths[-1] + new_tokens, "step_tokens": step_tokens}
    with report.written(output):
        for one in models:
            with both(report, one, longest, longest) as sides:
                rows = []
                for length in lengths:
                    report.progress(f"S {one.segment_size}, {one.dtype}: {length} tokens")
                    turns = rounds(repeat, max_seconds)
                    rows.append(_measure(sides, one, length, new_tokens, memory, turns))
                    report.rows.append(rows[-1])
                report.notes.append(_crossover(one, rows))


def _measure(
    sides: dict[str, Engine], model: Model, tokens: int, new_tokens: int, memory: float, turns: Iterator[int]
) -> Row:
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.report import median_ratio
    from vllm_armt.cli.bench.table import Row

    found: dict[str, list[float]] = {}
    held: dict[str, int] = {}
    for i in turns:
        for side in list(sides)[:: 1 if i % 2 == 0 else -1]:
            engine = sides[side]
            seconds, ms, blocks = _read_and_decode(engine, prompt(engine, tokens), new_tokens)
            found.setdefault(f"{side}_prefill_seconds", []).append(seconds)
            found.setdefault(f"{side}_decode_ms", []).append(ms)
            held[side] = blocks * engine.block_bytes
    ratio = median_ratio(found["base_prefill_seconds"], found["armt_prefill_seconds"])
    summary: dict[str, float | int | None] = {
        "base_over_armt": ratio,
        "decode_base_over_armt": median_ratio(found["base_decode_ms"], found["armt_decode_ms"]),
    }
    for side, size in held.items():
        summary |= {f"{side}_megabytes": size / 1e6, f"{side}_requests": int(memory * 2**30 // size)}
    return Row(model.case | {"tokens": tokens}, found, summary, ratio)


def _read_and_decode(engine: Engine, text: list[int], new_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token, median milliseconds of the others, and the most blocks held."""
    from vllm_armt.cli.bench.session import Session

    held: list[int] = []
    session = Session(engine, probe=lambda: held.append(engine.blocks_in_use))
    request = session.submit(text, new_tokens)
    session.finish()
    gaps = [after - before for before, after in zip(request.times, request.times[1:], strict=False)]
    return request.ttft, 1e3 * statistics.median(gaps), max(held)


def _crossover(model: Model, rows: list[Row]) -> str:
    """The first of the lengths from which on the ARMT is the faster one, and the ratios before it."""
    name = f"S {model.segment_size}, {model.dtype}"
    behind = [row for row in rows if (row.ratio or 0.0) < 1]
    losses = ", ".join(f"{row.ratio:.2f} at {row.case['tokens']:,} tokens" for row in behind)
    if not behind:
        return f"{name}: the ARMT is faster at every length."
    ahead = [row for row in rows if row.case["tokens"] > behind[-1].case["tokens"]]
    if not ahead:
        return f"{name}: the ARMT is not yet faster at the longest; base / ARMT is {losses}."
    return f"{name}: the ARMT is faster from {ahead[0].case['tokens']:,} tokens on; base / ARMT is {losses}."

"""`vllm-armt bench schedule`: the orders in which closed segments pass the layers, on one engine."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from vllm_armt.cli.bench import options
from vllm_armt.cli.values import whole_numbers

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine
    from vllm_armt.cli.bench.peak import Peak
    from vllm_armt.cli.bench.shapes import Model
    from vllm_armt.cli.bench.table import Row

MODES = ("sequential", "diagonal", "auto")


def schedule(
    shape: options.Shape = "12x512",
    model: options.ModelDirectory = None,
    dtype: options.Dtype = "bfloat16",
    segment_size: options.SegmentSize = None,
    num_mem_tokens: options.NumMemTokens = None,
    d_mem: options.DMem = None,
    tokens: options.Tokens = "16384",
    documents: options.Documents = "1",
    repeat: options.Repeat = 3,
    max_seconds: options.MaxSeconds = 120.0,
    step_tokens: options.StepTokens = None,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
    min_ratio: options.MinRatio = None,
) -> None:
    """Prefill in sequential and in diagonal order, in the one that `auto` chooses, and the share of the GEMM peak.

    Segment sizes are 32,128,512,1024 unless given. The ratio is diagonal over sequential. All modes must
    predict the same next token up to rounding.
    """
    output = options.Output(json_file, plot_file, min_ratio)
    models = options.models(shape, model, dtype, segment_size, num_mem_tokens, d_mem, "32,128,512,1024")
    lengths, counts = whole_numbers("--tokens", tokens), whole_numbers("--documents", documents)

    from vllm_armt.cli.bench.engines import engines
    from vllm_armt.cli.bench.peak import Peak
    from vllm_armt.cli.bench.report import Report, rounds
    from vllm_armt.cli.bench.table import Chart, Column

    report = Report(
        "schedule",
        f"Prefill of {models[0].name} in tokens/s; share of the GEMM peak of the best mode",
        [
            Column("dtype", "dtype"),
            Column("segment_size", "S"),
            Column("num_mem_tokens", "m"),
            Column("tokens", "tokens"),
            Column("documents", "documents"),
            *(Column(mode, mode) for mode in MODES),
            Column("diagonal_over_sequential", "diagonal / sequential", ".2f"),
            Column("auto_over_best", "auto / best", ".2f"),
            Column("of_peak", "of peak", ".0%"),
        ],
        Chart("segment_size", {mode: mode for mode in MODES}, "tokens/s", ("dtype", "tokens", "documents")),
    )
    with report.written(output):
        peaks: dict[str, Peak] = {}
        for one in models:
            if one.dtype not in peaks:
                peaks[one.dtype] = Peak(one.dtype)
            wanted = {
                "model": one,
                "max_model_len": max(lengths) + 1,
                "documents": max(counts),
                "step_tokens": step_tokens,
            }
            with engines(wanted) as (engine,):
                report.engines.append(one.case | engine.setting)
                for length, count in product(lengths, counts):
                    report.progress(f"S {one.segment_size}, {one.dtype}: {count} x {length} tokens")
                    turns = rounds(repeat, max_seconds)
                    report.rows.append(_measure(engine, one, length, count, peaks[one.dtype], turns, report.problems))


def _measure(
    engine: Engine, model: Model, tokens: int, documents: int, peak: Peak, turns: Iterator[int], problems: list[str]
) -> Row:
    """All modes in turn, round after round; a short round before them warms up."""
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.report import describe, median_ratio
    from vllm_armt.cli.bench.session import disagreement
    from vllm_armt.cli.bench.table import Row

    prompts = [prompt(engine, tokens, seed) for seed in range(documents)]
    for mode in MODES:
        _read(engine, mode, [text[: 2 * engine.step_tokens] for text in prompts])
    case = model.case | {"tokens": tokens, "documents": documents}
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    products = []
    for i in turns:
        answers = []
        products.append(peak.sample())
        for mode in MODES[i % len(MODES) :] + MODES[: i % len(MODES)]:
            seconds, answer = _read(engine, mode, prompts)
            rates[mode].append(tokens * documents / seconds)
            answers.append(answer)
        if (difference := disagreement(answers, model.dtype)) is not None:
            problems.append(f"{describe(case)}: the modes differ by {difference:.3g} in a log-probability.")
    best = max(("sequential", "diagonal"), key=lambda mode: statistics.median(rates[mode]))
    fastest = max(MODES, key=lambda mode: statistics.median(rates[mode]))
    ratio = median_ratio(rates["diagonal"], rates["sequential"])
    flops = [model.useful_flops(tokens) / tokens * rate for rate in rates[fastest]]
    summary: dict[str, float | int | None] = {
        "diagonal_over_sequential": ratio,
        "auto_over_best": median_ratio(rates["auto"], rates[best]),
        "useful_flops_per_second": statistics.median(flops),
        "of_peak": median_ratio(flops, products),
    }
    return Row(case, rates | {"peak_flops_per_second": products}, summary, ratio)


def _read(engine: Engine, mode: str, prompts: list[list[int]]) -> tuple[float, list[float]]:
    """Seconds until every document has its first token, and the log-probabilities of those."""
    from vllm_armt.cli.bench.session import Session

    engine.choose_schedule(mode)
    session = Session(engine)
    requests = [session.submit(text, 1, check=True) for text in prompts]
    session.finish()
    seconds = session.steps[-1].end - requests[0].submitted
    return seconds, [value for request in requests for value in request.log_probs]

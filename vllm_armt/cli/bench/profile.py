"""`vllm-armt bench profile`: where the time of a prefill goes."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

from vllm_armt.cli.bench import options

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine


def profile(
    shape: options.Shape = "12x512",
    model: options.ModelDirectory = None,
    dtype: options.Dtype = "bfloat16",
    segment_size: options.SegmentSize = None,
    num_mem_tokens: options.NumMemTokens = None,
    d_mem: options.DMem = None,
    tokens: options.Tokens = "16384",
    repeat: options.Repeat = 3,
    max_seconds: options.MaxSeconds = 60.0,
    step_tokens: options.StepTokens = None,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
    min_ratio: options.MinRatio = None,
) -> None:
    """Shares of projections, attention, memory, elementwise operators and the engine in the time of a prefill.

    Segment sizes are 128,1024 unless given. The ratio is the fraction of the GEMM peak, measured without the
    profiler. On a GPU shares are of the device's time, and what the device waits for is the engine's.
    """
    output = options.Output(json_file, plot_file, min_ratio)
    models = options.models(shape, model, dtype, segment_size, num_mem_tokens, d_mem, "128,1024")
    lengths = options.integers("--tokens", tokens)

    from vllm_armt.cli.bench.engines import engines
    from vllm_armt.cli.bench.peak import Peak
    from vllm_armt.cli.bench.report import Chart, Column, Report, Row, rounds
    from vllm_armt.cli.bench.shares import PARTS, shares
    from vllm_armt.cli.bench.sides import warm_up

    report = Report(
        "profile",
        f"{models[0].name}: one document; shares of the time under the profiler, which slows it by the last column",
        [
            Column("dtype", "dtype"),
            Column("segment_size", "S"),
            Column("tokens", "tokens"),
            Column("rate", "tokens/s"),
            Column("of_peak", "of GEMM peak", ".1%"),
            *(Column(part, name, ".1%", spread=False) for part, name in PARTS.items()),
            Column("slowed", "slowed by", ".0%", spread=False),
        ],
        Chart("segment_size", PARTS, "share of the time", ("dtype", "tokens"), stacked=True),
    )
    with report.written(output):
        peaks: dict[str, Peak] = {}
        for one in models:
            if one.dtype not in peaks:
                peaks[one.dtype] = Peak(one.dtype)
            peak = peaks[one.dtype]
            with engines({"model": one, "max_model_len": max(lengths) + 1, "step_tokens": step_tokens}) as (engine,):
                report.engines.append(one.case | engine.limits)
                warm_up(engine)
                for length in lengths:
                    report.progress(f"S {one.segment_size}, {one.dtype}: {length} tokens")
                    found: dict[str, list[float]] = defaultdict(list)
                    for _ in rounds(repeat, max_seconds):
                        found["peak_flops_per_second"].append(peak.sample())
                        seconds = _read(engine, length)
                        found["rate"].append(length / seconds)
                        found["of_peak"].append(one.useful_flops(length) / seconds / found["peak_flops_per_second"][-1])
                        parts, profiled = shares(engine, partial(_read, engine, length))
                        found["slowed"].append(profiled / seconds - 1)
                        for part, share in parts.items():
                            found[part].append(share)
                    row = Row(one.case | {"tokens": length}, dict(found))
                    row.ratio = row.value("of_peak")
                    report.rows.append(row)


def _read(engine: Engine, tokens: int) -> float:
    """Seconds to the first token after a document."""
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.session import Session

    session = Session(engine)
    request = session.submit(prompt(engine, tokens), 1)
    session.finish()
    return request.ttft

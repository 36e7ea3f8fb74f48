"""`vllm-armt bench profile`: where the time of a prefill goes, or that of decoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_armt.cli.bench import options
from vllm_armt.cli.values import whole_numbers

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine

DecodingRequests = Annotated[
    str | None,
    typer.Option(
        "--requests",
        help="Profile steps in which so many requests decode after a text, several numbers "
        "separated by commas. [default: profile the reading]",
        show_default=False,
    ),
]
DECODING_STEPS = 32


def profile(
    shape: options.Shape = "12x512",
    model: options.ModelDirectory = None,
    dtype: options.Dtype = "bfloat16",
    segment_size: options.SegmentSize = None,
    num_mem_tokens: options.NumMemTokens = None,
    d_mem: options.DMem = None,
    tokens: options.Tokens = "16384",
    requests: DecodingRequests = None,
    repeat: options.Repeat = 3,
    max_seconds: options.MaxSeconds = 60.0,
    step_tokens: options.StepTokens = None,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
    min_ratio: options.MinRatio = None,
) -> None:
    """Shares of projections, attention, memory, elementwise operators and the engine in the time of a prefill.

    With --requests, in that of decoding. Segment sizes are 128,1024 unless given. The ratio is the fraction of the
    GEMM peak, measured without the profiler; decoding has none. On a GPU shares are of the device's time, and what
    the device waits for is the engine's.
    """
    output = options.Output(json_file, plot_file, min_ratio)
    models = options.models(shape, model, dtype, segment_size, num_mem_tokens, d_mem, "128,1024")
    lengths = whole_numbers("--tokens", tokens)
    counts = [None] if requests is None else whole_numbers("--requests", requests)

    from vllm_armt.cli.bench.engines import engines
    from vllm_armt.cli.bench.peak import Peak
    from vllm_armt.cli.bench.report import Report, describe, rounds
    from vllm_armt.cli.bench.shares import PARTS, shares
    from vllm_armt.cli.bench.sides import warm_up
    from vllm_armt.cli.bench.table import Chart, Column, Row

    report = Report(
        "profile",
        f"{models[0].name}: {'one document' if requests is None else 'decoding'}; shares of the time under the "
        "profiler, which slows it by the last column",
        [
            Column("dtype", "dtype"),
            Column("segment_size", "S"),
            Column("tokens", "tokens"),
            *([] if requests is None else [Column("requests", "requests")]),
            Column("rate", "tokens/s"),
            Column("of_peak", "of GEMM peak", ".1%"),
            *(Column(part, name, ".1%", spread=False) for part, name in PARTS.items()),
            Column("slowed", "slowed by", ".0%", spread=False),
        ],
        Chart("segment_size", PARTS, "share of the time", ("dtype", "tokens", "requests"), stacked=True),
    )
    with report.written(output):
        peaks: dict[str, Peak] = {}
        for one in models:
            if one.dtype not in peaks:
                peaks[one.dtype] = Peak(one.dtype)
            peak = peaks[one.dtype]
            limits = {
                "max_model_len": max(lengths) + one.segment_size + 1,
                "documents": max(count or 1 for count in counts),
                "prefix_caching": requests is not None,
            }
            with engines({"model": one, "step_tokens": step_tokens} | limits) as (engine,):
                report.engines.append(one.case | engine.setting)
                warm_up(engine)
                for length, count in product(lengths, counts):
                    case = one.case | {"tokens": length} | ({} if count is None else {"requests": count})
                    report.progress(describe(case))
                    found: dict[str, list[float]] = defaultdict(list)
                    for _ in rounds(repeat, max_seconds):
                        found["peak_flops_per_second"].append(peak.sample())
                        with _reading(engine, length) if count is None else _decoding(engine, length, count) as work:
                            computed, run = work
                            seconds = run()
                            parts, profiled = shares(engine, run)
                        found["rate"].append(computed / seconds)
                        if count is None:
                            useful = one.useful_flops(length) / seconds
                            found["of_peak"].append(useful / found["peak_flops_per_second"][-1])
                        found["slowed"].append(profiled / seconds - 1)
                        for part, share in parts.items():
                            found[part].append(share)
                    row = Row(case, dict(found))
                    row.ratio = row.value("of_peak")
                    report.rows.append(row)


@contextmanager
def _reading(engine: Engine, tokens: int) -> Iterator[tuple[int, Callable[[], float]]]:
    """Tokens that are computed, and what computes them and returns the seconds: to the first token after a document."""
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.session import Session

    def read() -> float:
        session = Session(engine)
        request = session.submit(prompt(engine, tokens), 1)
        session.finish()
        return request.ttft

    yield tokens, read


@contextmanager
def _decoding(engine: Engine, tokens: int, requests: int) -> Iterator[tuple[int, Callable[[], float]]]:
    """Like `_reading`: a few steps in which requests decode after whole segments of a text, and close none."""
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.session import Session

    S = engine.block_size
    text = prompt(engine, max(1, tokens // S) * S)
    session = Session(engine)
    # the first one reads the text, which the others find in the prefix cache
    for members in (range(1), range(1, requests)):
        session.until_read([session.submit(text, S) for _ in members])
    begun = max(len(request.times) for request in session.requests.values())
    steps = max(1, min(DECODING_STEPS, (S - 1 - begun) // 2))

    yield requests * steps, lambda: sum(session.step().seconds for _ in range(steps))
    session.abort()

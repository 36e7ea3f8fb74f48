"""`vllm-armt bench decode`: tokens per second of requests that decode together, after short and long texts."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_armt.cli.bench import options
from vllm_armt.cli.values import whole_numbers

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine
    from vllm_armt.cli.bench.shapes import Model
    from vllm_armt.cli.bench.table import Row

BaseTokensMax = Annotated[int, typer.Option(min=0, help="The base model is measured up to this length.")]

Apart = Annotated[
    bool, typer.Option("--apart", help="Let the requests' segments close at different steps. [default: all at once]")
]


def decode(
    shape: options.Shape = "12x512",
    model: options.ModelDirectory = None,
    dtype: options.Dtype = "bfloat16",
    segment_size: options.SegmentSize = None,
    num_mem_tokens: options.NumMemTokens = None,
    d_mem: options.DMem = None,
    tokens: options.Tokens = "1024,131072",
    requests: options.Requests = "1,8,32,64",
    new_tokens: options.NewTokens = 64,
    base_tokens_max: BaseTokensMax = 4096,
    apart: Apart = False,
    repeat: options.Repeat = 3,
    max_seconds: options.MaxSeconds = 60.0,
    step_tokens: options.StepTokens = None,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
    min_ratio: options.MinRatio = None,
) -> None:
    """Decoding after texts of several lengths, by several requests at a time, against the base model in vLLM.

    The segment size is 128 unless given. The ratio is the ARMT's tokens/s over the base model's. A text is read
    once and found in the prefix cache by all requests; each brings an end of its own, so long that a segment
    closes while it is timed. Steps in which segments close are timed apart, and rates are those of median steps.
    """
    output = options.Output(json_file, plot_file, min_ratio)
    models = options.models(shape, model, dtype, segment_size, num_mem_tokens, d_mem, "128")
    lengths, counts = sorted(whole_numbers("--tokens", tokens)), whole_numbers("--requests", requests)

    from vllm_armt.cli.bench.report import Report, rounds
    from vllm_armt.cli.bench.sides import SIDES, both
    from vllm_armt.cli.bench.table import Chart, Column

    report = Report(
        "decode",
        f"{models[0].name}: decoding {new_tokens} tokens a request; a closing step is one in which segments close",
        [
            Column("dtype", "dtype"),
            Column("segment_size", "S"),
            Column("tokens", "context"),
            Column("requests", "requests"),
            Column("armt_rate", "ARMT tokens/s", ",.1f"),
            Column("base_rate", "base tokens/s", ",.1f"),
            Column("armt_over_base", "ARMT / base", ".2f"),
            Column("armt_step_ms", "ARMT ms/step", ".2f"),
            Column("over_shortest", "to shortest context", ".2f"),
            Column("closing_step_ms", "closing step ms", ".2f"),
            Column("closing_over_step", "closing / step", ".2f"),
        ],
        Chart("requests", {"armt_rate": "ARMT", "base_rate": "base"}, "tokens/s", ("dtype", "segment_size", "tokens")),
    )
    with report.written(output):
        for one in models:
            compared = [length for length in lengths if length <= base_tokens_max]
            own = max(_own_tokens(one.segment_size, new_tokens, max(counts), apart)) + new_tokens + max(counts) + 2
            limits: dict[str, Any] = {"documents": max(counts), "step_tokens": step_tokens, "prefix_caching": True}
            armt = limits | {"max_model_len": lengths[-1] + own}
            longest = compared[-1] if compared else 1
            base = limits | {
                "max_model_len": longest + own,
                "cached_tokens": sum(compared) + one.segment_size + max(counts) * own,
            }
            with both(report, one, armt, base) as sides:
                cases = [(length, side) for length in lengths for side in SIDES if side == "armt" or length in compared]
                for count in counts:
                    own_tokens = _own_tokens(one.segment_size, new_tokens, count, apart)
                    for length, side in cases:
                        report.progress(
                            f"S {one.segment_size}, {one.dtype}: {side} reads {length} tokens, {count} requests"
                        )
                        for _ in range(warm_rounds()):
                            _decode(sides[side], one, length, own_tokens, new_tokens, seed=0)
                    report.progress(f"S {one.segment_size}, {one.dtype}: {count} requests")
                    found: dict[int, dict[str, list[float]]] = {length: defaultdict(list) for length in lengths}
                    for i in rounds(repeat, max_seconds):
                        for length, side in cases[:: 1 if i % 2 == 0 else -1]:
                            times = _decode(sides[side], one, length, own_tokens, new_tokens, seed=1 + i)
                            _add(found[length], side, *times, count, max(one.segment_size, new_tokens))
                    report.rows += _rows(one.case | {"requests": count}, found)


def warm_rounds() -> int:
    """Rounds before the measured ones.

    On a GPU a step of new shapes runs as it comes, the next one is recorded and only then it is replayed; the step in
    which the requests' segments close comes once a round.
    """
    from vllm.platforms import current_platform

    return 1 if current_platform.is_cpu() else 2


def _own_tokens(segment_size: int, new_tokens: int, requests: int = 1, apart: bool = False) -> list[int]:
    """Tokens of each request's own end, so that its segment closes after three quarters of the new tokens.

    If the requests close apart, they do so over the two quarters before.
    """
    least = max(1, segment_size - 3 * new_tokens // 4)
    return [least + (i % (new_tokens // 2) if apart else 0) for i in range(requests)]


def _add(
    found: dict[str, list[float]], side: str, others: list[float], closing: list[float], requests: int, steps: int
) -> None:
    """Add what the median seconds of steps say; a segment of a long text closes every `steps`, whatever was timed."""
    if side == "base":
        # nothing closes there
        others, closing = others + closing, []
    step = statistics.median(others or closing)
    seconds = (steps - len(closing)) * step + (len(closing) * statistics.median(closing) if closing else 0.0)
    found[f"{side}_rate"].append(requests * steps / seconds)
    found[f"{side}_step_ms"].append(1e3 * step)
    if closing and others:
        found["closing_step_ms"].append(1e3 * statistics.median(closing))
        found["closing_over_step"].append(statistics.median(closing) / statistics.median(others))


def _rows(case: dict[str, Any], found: dict[int, dict[str, list[float]]]) -> Iterator[Row]:
    """A row for each length, the shortest first."""
    from vllm_armt.cli.bench.report import median_ratio
    from vllm_armt.cli.bench.table import Row

    shortest = next(iter(found.values()))["armt_step_ms"]
    for length, times in found.items():
        ratio = median_ratio(times["armt_rate"], times["base_rate"]) if "base_rate" in times else None
        summary = {"armt_over_base": ratio, "over_shortest": median_ratio(times["armt_step_ms"], shortest)}
        yield Row(case | {"tokens": length}, dict(times), summary, ratio)


def _decode(
    engine: Engine, model: Model, tokens: int, own_tokens: list[int], new_tokens: int, seed: int
) -> tuple[list[float], list[float]]:
    """Seconds of the steps in which all requests decode: those in which no segment closes, and the others.

    Raises:
        RuntimeError: the prefix cache did not have the text that was read before.
    """
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.session import Session

    S = model.segment_size
    shared = prompt(engine, max(0, tokens - max(own_tokens)) // S * S)
    session = Session(engine)
    # more tokens than are timed: the first ones decode already while the last ones are still read
    running = [
        session.submit(shared + prompt(engine, own, seed=1000 * seed + i + 1), new_tokens + len(own_tokens) + 1)
        for i, own in enumerate(own_tokens)
    ]
    session.until_read(running)
    if seed and (found := min(request.cached for request in running)) < len(shared) - engine.block_size:
        raise RuntimeError(
            f"Of a text of {len(shared)} tokens that was read before, the prefix cache has only {found}; the requests "
            "did not decode at the same time. Give fewer --requests or shorter --tokens."
        )
    others: list[float] = []
    closing: list[float] = []
    ends = [session.steps[-1].end]
    while len(ends) <= new_tokens:
        step = session.step()
        if not step.emitted:
            continue
        # the step computed the token before the newest one; that one may have ended its segment
        closes = any((request.prompt_tokens + len(request.times) - 1) % S == 0 for request in step.emitted)
        (closing if closes else others).append(step.end - ends[-1])
        ends.append(step.end)
    session.abort()
    return others, closing

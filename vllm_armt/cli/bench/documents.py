"""`vllm-armt bench documents`: many documents read together, and requests that decode beside them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_armt.cli.bench import options
from vllm_armt.cli.values import whole_numbers

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine
    from vllm_armt.cli.bench.shapes import Model
    from vllm_armt.cli.bench.table import Row

Mixed = Annotated[bool, typer.Option("--mixed", help="Also documents of a quarter, half, once and twice the length.")]
Beside = Annotated[int, typer.Option(min=0, help="Requests that decode while the documents are read.")]

MIXTURE = (0.25, 0.5, 1.0, 2.0)
"""Lengths of mixed documents, relative to `--tokens`."""

DECODER_PROMPT = 32
ALONE_STEPS = 32


def documents(
    shape: options.Shape = "12x512",
    model: options.ModelDirectory = None,
    dtype: options.Dtype = "bfloat16",
    segment_size: options.SegmentSize = None,
    num_mem_tokens: options.NumMemTokens = None,
    d_mem: options.DMem = None,
    tokens: options.Tokens = "2048",
    documents: options.Documents = "1,4,16,64",
    mixed: Mixed = False,
    beside: Beside = 4,
    repeat: options.Repeat = 3,
    max_seconds: options.MaxSeconds = 30.0,
    step_tokens: options.StepTokens = None,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
    min_ratio: options.MinRatio = None,
) -> None:
    """Documents that arrive together, read together against one after another; and who decodes beside them.

    Segment sizes are 32,128 unless given. The ratio is the throughput together over one after another, with
    more than one document; a second one is over one after another in the sequential order. All must predict
    the same next tokens up to rounding.
    """
    output = options.Output(json_file, plot_file, min_ratio)
    models = options.models(shape, model, dtype, segment_size, num_mem_tokens, d_mem, "32,128")
    counts, lengths = whole_numbers("--documents", documents), whole_numbers("--tokens", tokens)

    from vllm_armt.cli.bench.engines import engines
    from vllm_armt.cli.bench.report import Report, rounds
    from vllm_armt.cli.bench.sides import warm_up
    from vllm_armt.cli.bench.table import Chart, Column

    report = Report(
        "documents",
        f"{models[0].name}: documents that arrive together, time to first token in seconds; "
        f"{beside} requests decode beside them",
        [
            Column("dtype", "dtype"),
            Column("segment_size", "S"),
            Column("lengths", "tokens"),
            Column("documents", "documents"),
            Column("together_rate", "together tokens/s"),
            Column("one_by_one_rate", "one by one tokens/s"),
            Column("ratio", "ratio", ".2f"),
            Column("sequential_rate", "one by one, sequential tokens/s"),
            Column("over_sequential", "ratio", ".2f"),
            Column("together_ttft_mean", "together: mean", ".2f"),
            Column("together_ttft_p50", "p50", ".2f"),
            Column("together_ttft_max", "max", ".2f"),
            Column("one_by_one_ttft_mean", "one by one: mean", ".2f"),
            Column("one_by_one_ttft_p50", "p50", ".2f"),
            Column("one_by_one_ttft_max", "max", ".2f"),
            Column("alone_ms", "decode alone ms/token", ".1f"),
            Column("beside_ms", "beside", ".1f"),
            Column("beside_ms_max", "longest wait", ".1f"),
        ],
        Chart(
            "documents",
            {"together_rate": "together", "one_by_one_rate": "one by one"},
            "tokens/s",
            ("dtype", "segment_size", "lengths"),
        ),
    )
    cases = [Case(length, count, False) for length in lengths for count in counts]
    cases += [Case(length, count, True) for length in lengths for count in counts if mixed and count > 1]
    with report.written(output):
        for one in models:
            # every step reads a segment at least, and gives each decoder one token
            steps = max(sum(n // one.segment_size + 1 for n in case.lengths) for case in cases)
            decoder_tokens = ALONE_STEPS + steps + 2
            wanted = {
                "model": one,
                "max_model_len": max(*(max(case.lengths) + 1 for case in cases), DECODER_PROMPT + decoder_tokens),
                "documents": max(counts) + beside,
                "step_tokens": step_tokens,
            }
            with engines(wanted) as (engine,):
                report.engines.append(one.case | engine.setting)
                warm_up(engine)
                for case in cases:
                    report.progress(f"S {one.segment_size}, {one.dtype}: {case.documents} x {case.name} tokens")
                    turns = rounds(repeat, max_seconds)
                    row, problem = _measure(engine, one, case, beside, decoder_tokens, turns)
                    report.rows.append(row)
                    report.problems += problem


@dataclass(frozen=True)
class Case:
    """Documents of `tokens` tokens, or around that if they are mixed."""

    tokens: int
    documents: int
    mixed: bool

    @property
    def name(self) -> str:
        return f"{self.tokens} mixed" if self.mixed else str(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        factors = MIXTURE if self.mixed else (1.0,)
        return [
            max(1, int(self.tokens * factor)) for factor, _ in zip(cycle(factors), range(self.documents), strict=False)
        ]


def _measure(
    engine: Engine, model: Model, case: Case, beside: int, decoder_tokens: int, turns: Iterator[int]
) -> tuple[Row, list[str]]:
    """Together, one by one and beside decodes, round after round; and in what the ways of reading disagreed."""
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.report import describe, median_ratio
    from vllm_armt.cli.bench.session import disagreement
    from vllm_armt.cli.bench.table import Row

    texts = [prompt(engine, length, seed) for seed, length in enumerate(case.lengths)]
    total = sum(case.lengths)
    name = model.case | {"lengths": case.name, "documents": case.documents}
    found: dict[str, list[float]] = defaultdict(list)
    problems = []
    # a batch of this many is new to the engine
    _together(engine, [text[: model.segment_size] for text in texts])
    for i in turns:
        answers = []
        for side in sorted(WAYS, reverse=bool(i % 2)):
            ttfts, answer = WAYS[side](engine, texts)
            found[f"{side}_rate"].append(total / max(ttfts))
            found[f"{side}_ttft_mean"].append(statistics.mean(ttfts))
            found[f"{side}_ttft_p50"].append(statistics.median(ttfts))
            found[f"{side}_ttft_max"].append(max(ttfts))
            answers.append(answer)
        if (difference := disagreement(answers, model.dtype)) is not None:
            problems.append(
                f"{describe(name)}: read together, one by one and sequentially, they differ by {difference:.3g}."
            )
        if beside:
            alone, with_documents = _decode_beside(engine, texts, beside, decoder_tokens)
            found["alone_ms"].append(statistics.median(alone))
            found["alone_ms_max"].append(max(alone))
            found["beside_ms"].append(statistics.median(with_documents))
            found["beside_ms_max"].append(max(with_documents))
    if case.documents == 1:
        return Row(name, dict(found), {"ratio": None, "over_sequential": None}, None), problems
    ratio = median_ratio(found["together_rate"], found["one_by_one_rate"])
    over_sequential = median_ratio(found["together_rate"], found["sequential_rate"])
    return Row(name, dict(found), {"ratio": ratio, "over_sequential": over_sequential}, ratio), problems


def _together(engine: Engine, texts: list[list[int]]) -> tuple[list[float], list[float]]:
    """Seconds to each document's first token, and the log-probabilities of those."""
    from vllm_armt.cli.bench.session import Session

    session = Session(engine)
    requests = [session.submit(text, 1, check=True) for text in texts]
    session.finish()
    return [request.ttft for request in requests], [p for request in requests for p in request.log_probs]


def _one_by_one(engine: Engine, texts: list[list[int]]) -> tuple[list[float], list[float]]:
    """The same, where each document waits for the one before; all are waiting from the start."""
    from vllm_armt.cli.bench.session import Session

    session, requests = Session(engine), []
    for text in texts:
        requests.append(session.submit(text, 1, check=True))
        session.finish()
    begin = requests[0].submitted
    return [request.times[0] - begin for request in requests], [p for request in requests for p in request.log_probs]


def _sequentially(engine: Engine, texts: list[list[int]]) -> tuple[list[float], list[float]]:
    """One by one, each in the sequential order: what a plain implementation does."""
    engine.choose_schedule("sequential")
    try:
        return _one_by_one(engine, texts)
    finally:
        engine.choose_schedule("auto")


WAYS = {"together": _together, "one_by_one": _one_by_one, "sequential": _sequentially}


def _decode_beside(
    engine: Engine, texts: list[list[int]], decoders: int, decoder_tokens: int
) -> tuple[list[float], list[float]]:
    """Milliseconds between the tokens of decoding requests: alone, and while documents are read."""
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.session import Session

    session = Session(engine)
    decoding = [session.submit(prompt(engine, DECODER_PROMPT, 10_000 + i), decoder_tokens) for i in range(decoders)]
    session.until_read(decoding)
    while min(len(request.times) for request in decoding) <= ALONE_STEPS:
        session.step()
    counts = [len(request.times) for request in decoding]
    session.until_read([session.submit(text, 1) for text in texts])
    alone, beside = [], []
    for request, count in zip(decoding, counts, strict=True):
        gaps = [1e3 * (after - before) for before, after in pairwise(request.times)]
        alone += gaps[: count - 1]
        beside += gaps[count - 1 :]
    session.abort()
    return alone, beside

"""`vllm-armt bench memory`: what one request holds and costs, up to very long texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_armt.cli.bench import options
from vllm_armt.cli.values import whole_numbers

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine
    from vllm_armt.cli.bench.shapes import Model
    from vllm_armt.cli.bench.table import Row

REFERENCE = 65536
"""The length whose time per token the longer ones are compared with; if it is not measured, the nearest one."""


def memory(
    shape: options.Shape = "tiny",
    model: options.ModelDirectory = None,
    dtype: options.Dtype = "bfloat16",
    segment_size: options.SegmentSize = None,
    num_mem_tokens: options.NumMemTokens = None,
    d_mem: options.DMem = None,
    tokens: options.Tokens = "4096,65536,262144,1048576",
    repeat: options.Repeat = 3,
    max_seconds: options.MaxSeconds = 60.0,
    step_tokens: options.StepTokens = None,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
    min_ratio: options.MinRatio = None,
) -> None:
    """Pages and bytes of one request, time per token, resident memory, and the share of scheduling and planning.

    Segment sizes are 32,512 unless given. The ratio is the time per token at 65,536 tokens over that of longer
    texts: 1 means linear. What the process grows by includes vLLM's copies of the text itself.
    """
    output = options.Output(json_file, plot_file, min_ratio)
    models = options.models(shape, model, dtype, segment_size, num_mem_tokens, d_mem, "32,512")
    lengths = sorted(whole_numbers("--tokens", tokens))

    from vllm_armt.cli.bench.engines import engines
    from vllm_armt.cli.bench.report import Report, rounds
    from vllm_armt.cli.bench.sides import warm_up
    from vllm_armt.cli.bench.table import Chart, Column

    report = Report(
        "memory",
        f"{models[0].name}: one request; its pages hold all layers",
        [
            Column("dtype", "dtype"),
            Column("segment_size", "S"),
            Column("tokens", "tokens"),
            Column("pages", "pages held"),
            Column("megabytes", "MB held", ",.2f"),
            Column("base_megabytes", "KV cache of the base, MB", ",.1f"),
            Column("microseconds_per_token", "us/token", ",.2f"),
            Column("linearity", "linearity", ".3f"),
            Column("planning_share", "scheduling and planning", ".1%", spread=False),
            Column("resident_megabytes", "process MB", spread=False),
            Column("growth_megabytes", "grew by MB", ",.1f", spread=False),
        ],
        Chart("tokens", {"microseconds_per_token": "prefill"}, "microseconds a token", ("dtype", "segment_size")),
    )
    with report.written(output):
        for one in models:
            wanted = {"model": one, "max_model_len": lengths[-1] + 2, "step_tokens": step_tokens}
            with engines(wanted) as (engine,):
                report.engines.append(one.case | engine.setting)
                warm_up(engine)
                rows = []
                for length in lengths:
                    report.progress(f"S {one.segment_size}, {one.dtype}: {length} tokens")
                    rows.append(_measure(engine, one, length, rounds(repeat, max_seconds)))
                    report.rows.append(rows[-1])
                _compare(rows)


def _measure(engine: Engine, model: Model, tokens: int, turns: Iterator[int]) -> Row:
    """Read a text and decode one token more, so that its pages are seen while it holds them."""
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.probes import planning_probes, seconds
    from vllm_armt.cli.bench.session import Session
    from vllm_armt.cli.bench.table import Row

    found: dict[str, list[float]] = defaultdict(list)
    text = prompt(engine, tokens)
    pages = 0
    for _ in turns:
        watch = Watch(engine)
        session = Session(engine, watch.look)
        with seconds(planning_probes(engine)) as spent:
            request = session.submit(text, 2)
            session.until_read([request])
        session.finish()
        reading = [step.seconds for step in session.steps if step.end <= request.times[0]]
        found["microseconds_per_token"].append(1e6 * request.ttft / tokens)
        found["planning_share"].append(sum(spent.values()) / sum(reading))
        found["scheduling_seconds"].append(spent["scheduling"])
        found["planning_seconds"].append(spent["planning"])
        found["resident_megabytes"].append(watch.resident / 1e6)
        found["growth_megabytes"].append((watch.resident - watch.before) / 1e6)
        pages = max(pages, watch.pages)
    summary: dict[str, float | int | None] = {
        "pages": pages,
        "megabytes": pages * engine.block_bytes / 1e6,
        "base_megabytes": tokens * model.kv_bytes_per_token / 1e6,
    }
    return Row(model.case | {"tokens": tokens}, dict(found), summary)


class Watch:
    """The most pages and resident bytes seen since it was made.

    Attributes:
        pages: held by all requests.
        before, resident: bytes of this process at first, and at most.
    """

    def __init__(self, engine: Engine) -> None:
        import psutil

        self._engine, self._process = engine, psutil.Process()
        self.pages = 0
        self.before = self.resident = self._process.memory_info().rss

    def look(self) -> None:
        """Look once more."""
        self.pages = max(self.pages, self._engine.blocks_in_use)
        self.resident = max(self.resident, self._process.memory_info().rss)


def _compare(rows: list[Row]) -> None:
    """Set the linearity of rows that are longer than the reference."""
    reference = min(rows, key=lambda row: abs(row.case["tokens"] - REFERENCE))
    for row in rows:
        if row.case["tokens"] > reference.case["tokens"]:
            row.ratio = reference.value("microseconds_per_token") / row.value("microseconds_per_token")
            row.summary["linearity"] = row.ratio

"""`vllm-armt bench queue`: what requests that wait cost every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_armt.cli.bench import options

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine
    from vllm_armt.cli.bench.report import Row
    from vllm_armt.cli.bench.shapes import Model

Steps = Annotated[int, typer.Option(min=1, help="Steps that are timed.")]

EQUAL, ALIKE = "an equal text", "a text that begins alike"

PAGES_TO_START = 3
"""Free pages without which no long text is admitted."""


def queue(
    shape: options.Shape = "tiny",
    dtype: options.Dtype = "bfloat16",
    segment_size: options.SegmentSize = None,
    tokens: options.Tokens = "65536,1048576",
    requests: options.Requests = "500,4000",
    steps: Steps = 24,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
    min_ratio: options.MinRatio = None,
) -> None:
    """Milliseconds of `schedule()` while nothing waits, a long text waits for pages, or many for a common beginning.

    Segment sizes are 32 unless given. The ratio is the time with the least that waits for the same over the time with
    more: 1 means that more cost nothing.
    """
    output = options.Output(json_file, plot_file, min_ratio)
    models = options.models(shape, None, dtype, segment_size, None, None, "32")
    lengths, counts = sorted(options.integers("--tokens", tokens)), sorted(options.integers("--requests", requests))
    most = min(one.segment_size for one in models) - 2
    if steps > most:
        raise ValueError(
            f"--steps is {steps}, but whoever decodes so long needs new pages at S = {most + 2}. Give at most {most}."
        )

    from vllm_armt.cli.bench.engines import MAX_NUM_SEQS, engines
    from vllm_armt.cli.bench.report import Chart, Column, Report
    from vllm_armt.cli.bench.sides import warm_up

    report = Report(
        "queue",
        f"{models[0].name}: schedule() in ms, the median and the longest of {steps} steps",
        [
            Column("dtype", "dtype"),
            Column("segment_size", "S"),
            Column("waits_for", "waits for"),
            Column("requests", "requests"),
            Column("tokens", "tokens each"),
            Column("schedule_ms", "ms", ".2f", spread=False),
            Column("longest_ms", "longest", ".2f"),
            Column("ratio", "ratio", ".2f"),
        ],
        Chart("requests", {"schedule_ms": "schedule()"}, "ms", ("segment_size", "waits_for", "tokens")),
    )
    with report.written(output):
        for one in models:
            # as few as a step may have: a text that others wait for is not read up before all steps are timed
            step_tokens = one.segment_size + MAX_NUM_SEQS
            shared = (steps + 1) * step_tokens
            wanted = {
                "model": one,
                "max_model_len": max(*lengths, shared + one.segment_size) + 1,
                "step_tokens": step_tokens,
                "prefix_caching": True,
            }
            with engines(wanted) as (engine,):
                report.engines.append(one.case | engine.setting)
                warm_up(engine)
                cases = [
                    Case("nothing", 0, 0),
                    *(Case("pages", 1, length) for length in lengths),
                    *(Case(waits_for, count, shared) for waits_for in (EQUAL, ALIKE) for count in counts),
                ]
                least: dict[str, Row] = {}
                for seed, case in enumerate(cases):
                    report.progress(f"S {one.segment_size}: {case.requests} of {case.tokens} wait for {case.waits_for}")
                    row = _measure(engine, one, case, steps, seed)
                    report.rows.append(row)
                    first = least.setdefault(case.waits_for, row)
                    if first is not row:
                        row.ratio = first.value("schedule_ms") / row.value("schedule_ms")
                        row.summary["ratio"] = row.ratio


@dataclass(frozen=True)
class Case:
    """So many requests of so many tokens that wait for something."""

    waits_for: str
    requests: int
    tokens: int


def _measure(engine: Engine, model: Model, case: Case, steps: int, seed: int) -> Row:
    """Time the steps of those that don't wait."""
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.probes import seconds
    from vllm_armt.cli.bench.report import Row
    from vllm_armt.cli.bench.session import Session

    session = Session(engine)
    if case.waits_for in (EQUAL, ALIKE):
        text = prompt(engine, case.tokens, seed)
        session.submit(text, 1)
        session.step()
    else:
        text = prompt(engine, case.tokens, seed)
        while engine.free_blocks >= PAGES_TO_START:
            session.until_read([session.submit([len(session.requests)], model.segment_size)])
    own = model.segment_size if case.waits_for == ALIKE else 0
    waiting = [session.submit(text + prompt(engine, own, number), 1) for number in range(case.requests)]
    found = []
    with seconds([("schedule", engine.core.scheduler, "schedule")]) as spent:
        for _ in range(steps):
            before = spent["schedule"]
            session.step()
            found.append(1e3 * (spent["schedule"] - before))
    if any(request.times for request in waiting):
        raise RuntimeError("A request that was to wait has been served; this benchmark is wrong.")
    session.abort()
    name = model.case | {"waits_for": case.waits_for, "requests": case.requests, "tokens": case.tokens}
    return Row(name, {"schedule_ms": found}, {"longest_ms": max(found)})

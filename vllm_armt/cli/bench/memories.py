"""`vllm-armt bench memories`: what it costs to keep what was read, and what it saves to ask that."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_armt.cli.bench import options
from vllm_armt.cli.values import whole_numbers

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine
    from vllm_armt.cli.bench.session import Request
    from vllm_armt.cli.bench.shapes import Model
    from vllm_armt.cli.bench.table import Row
    from vllm_armt.memories.disk.manifest import Manifest
    from vllm_armt.memories.disk.store import Store

QUESTION = 32
"""Tokens of a question."""
NEW_TOKENS = 32
"""Decoded behind a text, to compare the engines."""
SPARE_PAGE = "0" * 64
"""Key of a page that is written to time it."""


def memories(
    shape: options.Shapes = "12x512",
    model: options.ModelDirectory = None,
    dtype: options.Dtype = "bfloat16",
    segment_size: options.SegmentSize = None,
    num_mem_tokens: options.NumMemTokens = None,
    d_mem: options.DMem = None,
    tokens: options.Tokens = "2k,16k",
    repeat: options.Repeat = 3,
    max_seconds: options.MaxSeconds = 60.0,
    step_tokens: options.StepTokens = None,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
    min_ratio: options.MinRatio = None,
) -> None:
    """Memories that last: built, saved, loaded and asked, against sending the text again.

    The segment size is 128 unless given; --model may be of any system. Two engines take turns, one that keeps memories
    and one without the option.
    The ratio is the time to the first token of text and question sent cold, over that of the question by memory whose
    page is read from its file (which the operating system has in RAM). All must predict the same next tokens up to
    rounding. With / without: an ordinary prompt, no memory in use, on the engine with the option over the other.
    """
    output = options.Output(json_file, plot_file, min_ratio)
    models = options.models_of_shapes(shape, model, dtype, segment_size, num_mem_tokens, d_mem, "128", any_system=True)
    lengths = sorted(whole_numbers("--tokens", tokens))

    from vllm_armt.cli.bench.engines import engines
    from vllm_armt.cli.bench.report import Report, rounds
    from vllm_armt.cli.bench.sides import warm_up
    from vllm_armt.cli.bench.table import Chart, Column

    report = Report(
        "memories",
        f"Seconds to the first token of an answer to a question of {QUESTION} tokens, by memory and with the text sent",
        [
            Column("shape", "shape"),
            Column("dtype", "dtype"),
            Column("segment_size", "S"),
            Column("tokens", "tokens", ","),
            Column("cold_seconds", "sent cold", ",.3f"),
            Column("cached_seconds", "sent, in prefix cache", ",.3f"),
            Column("file_seconds", "by memory, from file", ",.4f"),
            Column("pool_seconds", "by memory, in pool", ",.4f"),
            Column("ratio", "cold / file", ",.1f"),
            Column("build_seconds", "build", ",.3f"),
            Column("megabytes", "MB on disk", ",.2f"),
            Column("base_megabytes", "KV cache of the base, MB", ",.1f"),
            Column("save_ms", "save ms", ",.1f"),
            Column("load_ms", "load ms", ",.1f"),
            Column("read_ratio", "read, with / without", ".3f"),
            Column("decode_ratio", "decode, with / without", ".3f"),
        ],
        Chart(
            "tokens",
            {
                "cold_seconds": "sent cold",
                "cached_seconds": "sent, in prefix cache",
                "file_seconds": "by memory, from file",
                "pool_seconds": "by memory, in pool",
            },
            "seconds to the first token",
            ("shape", "dtype", "segment_size"),
        ),
    )
    with report.written(output):
        for one in models:
            wanted = {
                "model": one,
                "max_model_len": lengths[-1] + QUESTION + NEW_TOKENS + one.segment_size,
                "step_tokens": step_tokens,
                "prefix_caching": True,
                # the text that is sent again, and what a question leaves
                "documents": 3,
            }
            with (
                tempfile.TemporaryDirectory(prefix="vllm-armt-bench-") as folder,
                engines(wanted | {"memories": Path(folder)}, wanted) as (keeping, plain),
            ):
                report.engines.append(one.case | keeping.setting)
                for engine in (keeping, plain):
                    warm_up(engine)
                for length in lengths:
                    report.progress(f"{one.name}, S {one.segment_size}, {one.dtype}: {length} tokens")
                    turns = rounds(repeat, max_seconds)
                    row, problem = _measure(keeping, plain, one, length, turns)
                    report.rows.append(row)
                    report.problems += problem


def _measure(keeping: Engine, plain: Engine, model: Model, tokens: int, turns: Iterator[int]) -> tuple[Row, list[str]]:
    """Round after round with another text; and in what the ways to ask disagreed."""
    from vllm_armt.cli.bench.engines import prompt
    from vllm_armt.cli.bench.report import describe, median_ratio
    from vllm_armt.cli.bench.session import disagreement
    from vllm_armt.cli.bench.table import Row
    from vllm_armt.memories.identity import open_store

    store = open_store(keeping.llm.llm_engine.vllm_config)
    case = model.case | {"tokens": tokens}
    found: dict[str, list[float]] = defaultdict(list)
    problems, size = [], 0
    for i in turns:
        text, question = prompt(plain, tokens, seed=1000 + i), prompt(plain, QUESTION, seed=2000 + i)
        for side, engine in list({"without": plain, "with": keeping}.items())[:: -1 if i % 2 else 1]:
            request = _ask(engine, text + question, NEW_TOKENS)
            found[f"read_{side}_seconds"].append(request.ttft)
            found[f"decode_{side}_ms"].append(1e3 * statistics.median(b - a for a, b in pairwise(request.times)))
            if side == "without":
                sent = request
        found["cold_seconds"].append(sent.ttft)
        again = _ask(plain, text + question)
        found["cached_seconds"].append(again.ttft)

        memory, seconds = _build(keeping, store, text)
        size = memory.bytes
        found["build_seconds"].append(seconds)
        # so that the page has to be read from its file
        keeping.llm.reset_prefix_cache()
        from_file, in_pool = (_ask(keeping, question, memory=memory.id) for _ in range(2))
        found["file_seconds"].append(from_file.ttft)
        found["pool_seconds"].append(in_pool.ttft)
        save, load = _times_of_page(store, memory)
        found["save_ms"].append(1e3 * save)
        found["load_ms"].append(1e3 * load)
        answers = [request.log_probs for request in (sent, again, from_file, in_pool)]
        if (difference := disagreement(answers, model.dtype)) is not None:
            problems.append(
                f"{describe(case)}: by memory and with the text sent again they differ by {difference:.3g}."
            )
    ratio = median_ratio(found["cold_seconds"], found["file_seconds"])
    summary: dict[str, float | int | None] = {
        "ratio": ratio,
        "read_ratio": median_ratio(found["read_with_seconds"], found["read_without_seconds"]),
        "decode_ratio": median_ratio(found["decode_with_ms"], found["decode_without_ms"]),
        "megabytes": size / 1e6,
        "base_megabytes": tokens * model.kv_bytes_per_token / 1e6,
    }
    return Row(case, dict(found), summary, ratio), problems


def _ask(engine: Engine, prompt: list[int], new_tokens: int = 1, memory: str | None = None) -> Request:
    from vllm_armt.cli.bench.session import Session

    session = Session(engine)
    request = session.submit(prompt, new_tokens, check=True, memory=memory)
    session.finish()
    return request


def _build(engine: Engine, store: Store, text: list[int]) -> tuple[Manifest, float]:
    """The memory of a text of which nothing is in the pool, and the seconds until it is on the disk."""
    from vllm_armt.memories.reading import read, read_with

    engine.take_turn()
    engine.llm.reset_prefix_cache()
    begin = time.perf_counter()
    reading = read(
        store,
        [text],
        segment_size=engine.block_size,
        max_model_len=engine.setting["max_model_len"],
        total=len(text),
    )
    return read_with(engine.llm, reading), time.perf_counter() - begin


def _times_of_page(store: Store, memory: Manifest) -> tuple[float, float]:
    """Seconds to write a memory's state to the disk, and to read and check it; without an engine."""
    if memory.page is None:
        raise ValueError(f"A text of {memory.tokens} tokens closes no segment and has no state. Give longer --tokens.")
    with store.pages.reading(memory.page) as (_, header):
        expected = header.spec
    begin = time.perf_counter()
    tensors = store.pages.load(memory.page, expected)
    loaded = time.perf_counter()
    store.pages.save(SPARE_PAGE, tensors)
    saved = time.perf_counter()
    store.pages.remove(SPARE_PAGE)
    return saved - loaded, loaded - begin

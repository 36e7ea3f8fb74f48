"""A worker without a model, which checks what every step reads and writes.

It knows pages by what they hold: the memory after a text, or KV of the open segment at its end. Reading a page
that holds anything else fails, which catches nearly every allocator bug.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_armt.config import RecurrentConfig
from vllm_armt.core import Segmentation


class Content(NamedTuple):
    """What a page holds of a text: the keys of a segment, or the memory after it.

    Attributes:
        kind: "kv" or "memory".
        where: what else decides where segments lie, and the column of keys.
        text: all tokens up to the last that the page is made of.
    """

    kind: str
    where: tuple[int, ...]
    text: bytes

    def serves(self, wanted: Content) -> bool:
        """Whether the page can be read as `wanted`; further keys are overwritten before they are read."""
        return self == wanted or (self[:2] == wanted[:2] and self.kind == "kv" and self.text.startswith(wanted.text))


class Worker:
    """Executes steps on pages that are labels, after the executor's rule."""

    def __init__(self, config: RecurrentConfig, columns: int) -> None:
        self.config = config
        self.segment_size = config.segment_size
        self.columns = columns
        self.pages: dict[int, Content] = {}
        self.tables: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.segmentations: dict[str, Segmentation] = {}

    def execute(self, output: SchedulerOutput, texts: dict[str, bytes], known: dict[str, int]) -> ModelRunnerOutput:
        """Run a step; `known` is how many tokens of each request the scheduler knows."""
        self._follow(output)
        reads: dict[int, str] = {}
        writes: dict[int, Content] = {}
        sampled = {}
        for name, n in output.num_scheduled_tokens.items():
            start, end = self.computed[name], self.computed[name] + n
            pieces = self.segmentations[name].split(start, end)
            assert all(piece.is_whole and piece.n == self.segment_size for piece in pieces[:-1]), "not for the wave"
            for page, content in self._reads(name, start, texts[name]).items():
                assert page in self.pages, f"{name} reads {page} at {start}, where nothing is"
                assert self.pages[page].serves(content), f"{name} reads {page} at {start}"
                reads[page] = name
            for page, content in self._writes(name, start, end, texts[name]).items():
                assert page not in writes, f"page {page} is written twice"
                writes[page] = content
            self.computed[name] = end
            sampled[name] = [texts[name][end]] if end >= known[name] else []
        for page, name in reads.items():
            assert page not in writes or page in self._own_writes(output, name), f"{name} reads {page} in flux"
        self.pages |= writes
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={name: i for i, name in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
        )

    def check_memory(self, name: str, column: int, page: int, text: bytes) -> None:
        """Check that a page holds the memory after a request's segment."""
        beyond = self.segmentations[name].begin(column + 1)
        content = self._content(name, column, beyond, text)
        assert self.pages.get(page) == content, f"page {page} is not the memory of {name} at {beyond}"

    def _follow(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            self.computed[new.req_id] = new.num_computed_tokens
            self.segmentations[new.req_id] = self.config.segmentation(new.prompt_len)
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                self.tables[name] = []
                self.computed[name] = computed
            assert self.computed[name] == computed, "a token is skipped or computed twice"
            self.tables[name] += blocks[0] if blocks else []

    def _reads(self, name: str, start: int, text: bytes) -> dict[int, Content]:
        segmentation, table = self.segmentations[name], self.tables[name]
        segment = segmentation.segment(start)
        begin = segmentation.begin(segment)
        pages = {}
        if segment:
            pages[table[segment - 1]] = self._content(name, segment - 1, begin, text)
        for i in range(-(-(start - begin) // self.segment_size)):
            pages[table[segment + i]] = self._content(name, segment + i, start, text)
        assert 0 not in pages, "the null page is read"
        return pages

    def _writes(self, name: str, start: int, end: int, text: bytes) -> dict[int, Content]:
        segmentation, table = self.segmentations[name], self.tables[name]
        retained = segmentation.retained(end, self.segment_size)
        assert len(table) == retained.stop <= self.columns
        pages = {}
        for column in range(self._first_written(name, start), len(table)):
            assert (table[column] != 0) == (column in retained), f"column {column} of a chunk to {end}"
            if column in retained:
                pages[table[column]] = self._content(name, column, end, text)
        return pages

    def _content(self, name: str, column: int, end: int, text: bytes) -> Content:
        """What a column's page holds once the tokens `[0, end)` are computed."""
        segmentation = self.segmentations[name]
        last = segmentation.last
        if last is not None and column >= last:
            beyond = segmentation.begin(last) + (column - last + 1) * self.segment_size
            where = (segmentation.size, segmentation.lead, last, column)
            return Content("kv", where, text[: min(beyond, end)])
        beyond = segmentation.begin(column + 1)
        if beyond > end:
            return Content("kv", (segmentation.size, segmentation.lead, column), text[:end])
        return Content("memory", (segmentation.size, segmentation.lead), text[:beyond])

    def _first_written(self, name: str, start: int) -> int:
        return self.segmentations[name].retained(start + 1, self.segment_size)[-1]

    def _own_writes(self, output: SchedulerOutput, name: str) -> list[int]:
        start = self.computed[name] - output.num_scheduled_tokens[name]
        return self.tables[name][self._first_written(name, start) :]

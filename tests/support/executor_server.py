"""Runs documents through the wave and the open rows, step by step, against the sequential reference."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.chunks import furthest_end
from tests.support.near import assert_near
from tests.support.random_models import CPU, LAYERS, Model, Pool, S
from tests.support.reference import random_document
from vllm_armt.executor.naive import State
from vllm_armt.executor.tails import TailMetadata, run_tails
from vllm_armt.executor.wave import run_wave
from vllm_armt.plan.step import Chunk, Schedule, plan_step
from vllm_armt.plan.tails import TailRows
from vllm_armt.plan.wave import WaveMetadata

MANY = 1000
"""Cells of a grouped forward, more than there are."""


@dataclass(frozen=True)
class Document:
    """A request: its prompt's tokens, the step at which it comes and the end of each of its chunks."""

    prompt: int
    arrival: int
    ends: list[int]

    @property
    def length(self) -> int:
        return self.ends[-1]

    def chunk(self, step: int) -> tuple[int, int] | None:
        """Start and end of what it computes in a step."""
        i = step - self.arrival
        return ([0, *self.ends][i], self.ends[i]) if 0 <= i < len(self.ends) else None


class Server:
    """Runs documents step by step, with poisoned pages for what is kept and page 0 for the rest."""

    def __init__(self, model: Model, requests: list[Document], schedule: Schedule, all_outputs: bool = True) -> None:
        self.requests, self.schedule, self.all_outputs = requests, schedule, all_outputs
        self.segmentations = [model.config.segmentation(document.prompt) for document in requests]
        columns = max(
            segmentation.retained(document.length, S).stop
            for segmentation, document in zip(self.segmentations, requests, strict=True)
        )
        self.table = torch.zeros(len(requests), columns, dtype=torch.int32)
        self.pool = Pool(model.layout, 1 + self.table.numel())
        self.free = list(range(1, 1 + self.table.numel()))
        self.parts = dataclasses.replace(model.parts, pages=self.pool.layers)
        self.texts = [
            random_document(model, document.length, segmentation)
            for document, segmentation in zip(requests, self.segmentations, strict=True)
        ]
        """Of each request, its embeddings and what the reference says of them."""

    def run(self, tolerance: float = 1e-4) -> None:
        """Compute everything, and compare outputs and kept state with the reference after every step.

        State may differ by `tolerance`.
        """
        for step in range(max(document.arrival + len(document.ends) for document in self.requests)):
            chunks = self._chunks(step)
            if not chunks:
                continue
            inputs = torch.cat([self.texts[c.request][0][c.start : c.end] for c in chunks])
            outputs = self._forward(chunks, inputs)
            for c in chunks:
                _, expected, states = self.texts[c.request]
                asked = slice(c.start if self.all_outputs else c.end - 1, c.end)
                assert_near(outputs[c.row + asked.start - c.start : c.row + asked.stop - c.start], expected[asked])
                self._release(c)
                self._check_pages(c, states, tolerance)
            assert self.pool.is_poisoned(0)
            assert all(self.pool.is_poisoned(page) for page in self.free)

    def _chunks(self, step: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        row = 0
        for request, document in enumerate(self.requests):
            if (span := document.chunk(step)) is None:
                continue
            chunks.append(Chunk(request, row, *span, self.segmentations[request]))
            row += span[1] - span[0]
            for column in self._retained(chunks[-1]):
                if self.table[request, column] == 0:
                    self.table[request, column] = self.free.pop()
        return chunks

    def _retained(self, chunk: Chunk) -> list[int]:
        return [column for column in chunk.segmentation.retained(chunk.end, S) if column >= 0]

    def _forward(self, chunks: list[Chunk], inputs: Tensor) -> Tensor:
        plan = plan_step(chunks, self.schedule)
        outputs = torch.full_like(inputs, torch.nan)
        if plan.wave:
            metadata = WaveMetadata.build(plan.wave, LAYERS, False, self.table, CPU, self.all_outputs)
            run_wave(self.parts, metadata, inputs, outputs)
        if plan.tails:
            attention, recurrence = self.parts.attention, self.parts.recurrence
            rows = TailRows(plan.tails, self.parts.layout, self.table, CPU)
            moves_keys = self.parts.move is not None
            tails = TailMetadata.build(rows, attention, recurrence, self.pool.layers[0], moves_keys)
            self.run_tails(tails, inputs, outputs)
        return outputs

    def run_tails(self, metadata: TailMetadata, inputs: Tensor, outputs: Tensor) -> None:
        run_tails(self.parts, metadata, inputs, outputs)

    def _release(self, chunk: Chunk) -> None:
        """Take back the pages that the next chunk does not read."""
        retained = self._retained(chunk)
        for column, page in enumerate(self.table[chunk.request].tolist()):
            if page and column not in retained:
                self.table[chunk.request, column] = 0
                self.pool.poison(page)
                self.free.append(page)

    def _check_pages(self, chunk: Chunk, states: list[State], tolerance: float) -> None:
        closed = sum(piece.closes for piece in chunk.segmentation.split(0, chunk.end))
        for column in self._retained(chunk):
            if column < closed:
                page = int(self.table[chunk.request, column])
                for pages, state in zip(self.pool.layers, states[column], strict=True):
                    for name, expected in state.items():
                        assert_near(pages.state[name][page], expected, tolerance)


def legal(model: Model, prompt: int, *stops: int, arrival: int = 0) -> Document:
    """A text that is read in as long chunks as are legal, up to each of some stops."""
    segmentation, ends = model.config.segmentation(prompt), [0]
    for stop in stops:
        while ends[-1] < stop:
            ends.append(furthest_end(segmentation, S, ends[-1], stop))
    return Document(prompt, arrival, ends[1:])


def schedule_of(model: Model, mode: str, max_cells: int = MANY) -> Schedule:
    layout = model.parts.layout
    return Schedule(mode, max_cells * layout.rows, LAYERS, layout.tokens, layout.rows, model.parts.recurrence.flow)

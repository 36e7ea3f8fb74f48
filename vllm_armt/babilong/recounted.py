"""Samples whose lengths are counted in the tokens of another tokenizer than the model's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from vllm_armt.babilong.samples import Cell, Sample, Samples
from vllm_armt.babilong.stories import Task, task_named


class Recounted:
    """Samples made with one tokenizer, read by another.

    Args:
        samples: made with the tokenizer that lengths are counted in.
        tokenizer: of the model.
        segment_size: S of the model, to know which facts are cut; None if it has no segments.
    """

    def __init__(self, samples: Samples, tokenizer: PreTrainedTokenizerBase, segment_size: int | None) -> None:
        self.samples = samples
        self.tokenizer = tokenizer
        self.first = list(tokenizer("").input_ids)
        self.segment_size = segment_size

    def sample(self, task: Task, cell: Cell, index: int) -> Sample:
        """The sample `index` of a cell, in the model's tokens."""
        made = self.samples.sample(task, cell, index)
        before = len(self.samples.first)
        bounds = [before, *made.starts, len(made.ids)]
        words = self.samples.encode.tokenizer
        texts = [words.decode(made.ids[a:b]) for a, b in pairwise(bounds)]
        encoding = self.tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = np.array([end for _, end in encoding.offset_mapping])
        begins = np.cumsum([len(text) for text in texts[:-1]])
        starts = np.searchsorted(ends, begins, side="right") + len(self.first)
        beyond = [begin + len(fact.text) for begin, fact in zip(begins, made.story.facts, strict=True)]
        lasts = np.searchsorted(ends, beyond, side="left") + len(self.first)
        S = self.segment_size
        is_cut = S is not None and any(starts[i] // S < lasts[i] // S for i in made.story.question.supports)
        ids = np.array(self.first + encoding.input_ids, dtype=np.int32)
        return replace(made, ids=ids, starts=tuple(starts.tolist()), is_cut=is_cut)

    def longest(self, cells: Iterable[Cell], count: int) -> int:
        """Tokens of the longest prompt among the first `count` samples of each cell."""
        return max(len(self.sample(task_named(cell.task), cell, i).ids) for cell in cells for i in range(count))

    def count(self, cell: Cell, wanted: int) -> int:
        """As many as wanted: there is no end of them."""
        return wanted

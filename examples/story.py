"""A long document of real text with a story hidden in it, and what can be asked about the story."""

from dataclasses import dataclass
from random import Random

import numpy as np
from transformers import PreTrainedTokenizerBase

from vllm_armt.babilong import Background, Encoder, Fact, Question, split_of, task_named, weave

DRAWS = 100
"""Questions drawn of a story: enough for each that it has to come up."""


@dataclass(frozen=True)
class StoryDocument:
    """A document.

    Attributes:
        ids: its tokens.
        facts: of the story, in their order.
        starts: where each begins, in tokens.
        questions: everything that can be asked once the story has ended, once each.
    """

    ids: list[int]
    facts: list[Fact]
    starts: list[int]
    questions: list[Question]


def hide_story(
    tokenizer: PreTrainedTokenizerBase, background: Background, length: int, facts: int, seed: int
) -> StoryDocument:
    """Hide a story of qa1's test part, facts at even distances, in `length` tokens of a text."""
    random = Random(seed)
    while True:
        episode = task_named("qa1").episode(random)
        while len(episode.facts) < facts and episode.tell():
            pass
        if split_of(episode.facts) == "test":
            break
    encode = Encoder(tokenizer)
    pieces = [encode.sentence(fact.text).ids for fact in episode.facts]
    document = weave(pieces, np.linspace(0, 1, len(pieces), endpoint=False).tolist(), length, background, random)
    drawn = filter(None, (episode.ask() for _ in range(DRAWS)))
    questions = {question.text: question for question in drawn}
    return StoryDocument(document.ids.tolist(), episode.facts, document.starts, list(questions.values()))

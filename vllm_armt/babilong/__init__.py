"""BABILong's question: facts hidden in a long text, and what a model answers that has read it.

Stories in bAbI's sentences and the ARMT paper's pairs, the text that they are hidden in, prompts to the token as long
as asked for, and the scoring. Nothing here knows an engine.
"""

from vllm_armt.babilong.background import WHITESPACE, Background, Whitespace
from vllm_armt.babilong.distractors import KINDS, distractor
from vllm_armt.babilong.documents import Cut, Document, weave
from vllm_armt.babilong.encoder import Encoder
from vllm_armt.babilong.episodes import UNKNOWN, Episode, Fact, Question
from vllm_armt.babilong.prompts import PLAIN, Prompt, in_chat, prompts
from vllm_armt.babilong.samples import MENTIONS, Cell, Sample, Samples, Source
from vllm_armt.babilong.scoring import is_right, wilson
from vllm_armt.babilong.stories import SPLITS, TASKS, Split, Story, Task, split_of, story, task_named
from vllm_armt.babilong.wordings import reworded

__all__ = [
    "KINDS",
    "MENTIONS",
    "PLAIN",
    "SPLITS",
    "TASKS",
    "UNKNOWN",
    "WHITESPACE",
    "Background",
    "Cell",
    "Cut",
    "Document",
    "Encoder",
    "Episode",
    "Fact",
    "Prompt",
    "Question",
    "Sample",
    "Samples",
    "Source",
    "Split",
    "Story",
    "Task",
    "Whitespace",
    "distractor",
    "in_chat",
    "is_right",
    "prompts",
    "reworded",
    "split_of",
    "story",
    "task_named",
    "weave",
    "wilson",
]

"""BABILong's question: facts hidden in a long text, and what a model answers that has read it.

Stories in bAbI's sentences and the ARMT paper's pairs, the text that they are hidden in, prompts to the token as long
as asked for, and the scoring. Nothing here knows an engine.
"""

from vllm_armt.babilong.background import Background
from vllm_armt.babilong.documents import Cut, Document, weave
from vllm_armt.babilong.episodes import Episode, Fact, Question
from vllm_armt.babilong.samples import PROMPTS, Cell, Encoder, Sample, Samples
from vllm_armt.babilong.scoring import is_right, wilson
from vllm_armt.babilong.stories import SPLITS, TASKS, Split, Story, Task, split_of, story, task_named

__all__ = [
    "PROMPTS",
    "SPLITS",
    "TASKS",
    "Background",
    "Cell",
    "Cut",
    "Document",
    "Encoder",
    "Episode",
    "Fact",
    "Question",
    "Sample",
    "Samples",
    "Split",
    "Story",
    "Task",
    "is_right",
    "split_of",
    "story",
    "task_named",
    "weave",
    "wilson",
]

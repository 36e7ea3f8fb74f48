"""BABILong's samples and scoring for lm-evaluation-harness: the same as those of `vllm-armt babilong`."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from examples.background import fetch
from vllm_armt.babilong import Background, Cell, Question, Samples, is_right, task_named


def draw(
    task: str, tokenizer: str, length: int = 4000, samples: int = 100, background: str | None = None, **_: Any
) -> dict[str, Dataset]:
    """Samples of the test part, as texts: those of `vllm-armt babilong --mentions 1`.

    Args:
        task: its name.
        tokenizer: directory of the model, by whose tokens the prompts are as long as asked for.
        length: tokens of a prompt; 0 for the story alone.
        samples: how many.
        background: directory of .txt files to hide facts in. [default: books, which are fetched]
        _: whatever else the harness knows of the model.
    """
    words = AutoTokenizer.from_pretrained(tokenizer)
    books = Path(background) if background else fetch() / "test"
    text = Background.of_directory(books, words, "collapsed") if length else None
    source = Samples(words, text, mentions=1.0, whitespace="collapsed")
    drawn = [source.sample(task_named(task), Cell(task, length), i) for i in range(samples)]
    rows = [
        {
            "task": task,
            # the server puts the first token before the text itself
            "prompt": words.decode(sample.ids, skip_special_tokens=True),
            "question": sample.story.question.text,
            "about": sample.story.question.about,
            "answer": sample.story.question.answer,
        }
        for sample in drawn
    ]
    return {"test": Dataset.from_list(rows)}


def score(row: dict[str, Any], outputs: list[str]) -> dict[str, float]:
    """Whether an answer is right, as BABILong decides it."""
    question = Question(row["question"], row["answer"], row["about"], ())
    return {"acc": float(is_right(task_named(row["task"]), question, outputs[0]))}

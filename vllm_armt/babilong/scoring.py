"""Which answers are right, and how sure an accuracy is."""

from __future__ import annotations

import math
import re

from vllm_armt.babilong.episodes import UNKNOWN, Question
from vllm_armt.babilong.stories import Task


def is_right(task: Task, question: Question, output: str) -> bool:
    """Whether what a model wrote answers a question, as BABILong's own code decides it.

    Of the first sentence the labels count which the question does not name: the right one must be there, and no
    other. Symbols of the associative tasks are letters that any word holds, so there the first word must be the
    answer.
    """
    if task.exact:
        words = re.findall(r"\w+", output)
        return bool(words) and words[0] == question.answer
    said = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    asked = question.text.lower()
    labels = {label.lower() for label in (*task.labels, UNKNOWN)}
    return {label for label in labels if label in said and label not in asked} == {question.answer.lower()}


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share, of 95 % confidence unless `z` says otherwise; all of [0, 1] for no samples."""
    if total == 0:
        return 0.0, 1.0
    share, weight = right / total, z * z / total
    centre = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    # rounding must leave neither the share outside of its interval, nor that outside of [0, 1]
    low, high = (centre - half) / (1 + weight), (centre + half) / (1 + weight)
    return max(0.0, min(share, low)), min(1.0, max(share, high))

"""Where the samples of a run come from: our own stories, bAbI's, or rows that BABILong has published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vllm_armt.babilong import Background, Cell, Prompt, Source


@dataclass(frozen=True)
class Wanted:
    """What samples are asked for; the options of the command.

    Attributes:
        data: directory of bAbI's files or of BABILong's rows; None for our own stories.
        background, whitespace: the text that facts are hidden in.
        prompt, prompts: which prompt, and the file of prompts in place of ours.
        length_tokenizer: in whose tokens lengths are counted; None for the model's own.
        drawn: further arguments of `Samples`.
    """

    data: Path | None
    background: Path
    whitespace: str
    prompt: str
    prompts: Path | None
    length_tokenizer: str | None
    drawn: dict[str, Any]


def source_of(wanted: Wanted, cells: list[Cell], words: PreTrainedTokenizerBase) -> tuple[Source, Background | None]:
    """Who makes the samples, and the text that they are hidden in.

    Raises:
        ValueError: options exclude each other, or there is no such data, prompt or text.
    """
    from transformers import AutoTokenizer

    from vllm_armt.babilong import Background, Samples
    from vllm_armt.babilong.babi import Babi, has_files
    from vllm_armt.babilong.published import Published
    from vllm_armt.babilong.recounted import Recounted

    prompt = prompt_of(wanted.prompt, wanted.prompts, words)
    if wanted.data is not None and not has_files(wanted.data):
        _refuse_for_rows(wanted, cells)
        return Published(wanted.data, words, prompt), None
    tell = Babi(wanted.data, sorted({cell.task for cell in cells})) if wanted.data is not None else None
    drawn = {**wanted.drawn, "prompt": prompt, "whitespace": wanted.whitespace, "tell": tell}
    counted = words
    if wanted.length_tokenizer is not None:
        if wanted.drawn["cut"]:
            raise ValueError(
                "--cut needs lengths in the model's own tokens, as its segments have. Leave out --length-tokenizer."
            )
        counted = AutoTokenizer.from_pretrained(wanted.length_tokenizer)
    has_text = any(cell.length for cell in cells)
    text = Background.of_directory(wanted.background, counted, wanted.whitespace) if has_text else None  # type: ignore[arg-type]
    samples = Samples(counted, text, **drawn)
    if counted is words:
        return samples, text
    return Recounted(samples, words, wanted.drawn["segment_size"]), text


def prompt_of(name: str, file: Path | None, words: PreTrainedTokenizerBase) -> Callable[[str], Prompt]:
    """What stands around a text, by task.

    Raises:
        ValueError: there is no such prompt for a task, or no chat template.
    """
    from vllm_armt.babilong import PLAIN, in_chat, prompts

    if name == "plain":
        if file is not None:
            raise ValueError("--prompts is a file of prompts for --prompt babilong or chat, but --prompt is plain.")
        return lambda task: PLAIN
    every = prompts(file) if file else prompts()

    def prompt(task: str) -> Prompt:
        if task not in every:
            raise ValueError(
                f"There is no prompt for {task}; there are some for {', '.join(every)}. Use --prompt plain."
            )
        return in_chat(every[task], words) if name == "chat" else every[task]

    return prompt


def _refuse_for_rows(wanted: Wanted, cells: list[Cell]) -> None:
    """What makes no sense for samples that are asked as they are."""
    given = {
        "--length-tokenizer": wanted.length_tokenizer is not None,
        "--facts": any(cell.facts is not None for cell in cells),
        "--hard": any(cell.kind is not None for cell in cells),
        "--cut": wanted.drawn["cut"] > 0,
        "--mentions": wanted.drawn["mentions"] > 0,
    }
    for option, is_given in given.items():
        if is_given:
            raise ValueError(f"The rows in {wanted.data} are asked as they are. Leave out {option}.")

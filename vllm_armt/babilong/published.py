"""BABILong's published samples, from a directory: rows of `input`, `question` and `target`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from vllm_armt.babilong.encoder import Encoder
from vllm_armt.babilong.episodes import Fact, Question
from vllm_armt.babilong.prompts import PLAIN, Prompt
from vllm_armt.babilong.samples import Cell, Sample, last_named
from vllm_armt.babilong.stories import Story, Task, task_named

Rows = list[dict[str, str]]

_PLACE = re.compile(r"(?<![a-zA-Z0-9])(?:(qa\d+)|(\d+)([kM]))(?![a-zA-Z0-9])")
"""A task or a length in a path: `qa1/4k.json`, `data/4k/qa1-00000-of-00001.parquet`."""

_UNITS = {"k": 1_000, "M": 1_000_000}


class Published:
    """Asks the rows as they are: their length is what their path says, in the tokens of who made them.

    Args:
        directory: of files (.parquet, .json, .jsonl) or of data sets that `datasets` saved, in whose paths the task and
            the length stand.
        tokenizer: of the model that is asked.
        prompt: what stands around a text, by task.

    Raises:
        ValueError: there are none.
    """

    def __init__(
        self, directory: Path, tokenizer: PreTrainedTokenizerBase, prompt: Callable[[str], Prompt] = lambda task: PLAIN
    ) -> None:
        self.directory = directory
        self.encode = Encoder(tokenizer)
        self.first = list(tokenizer("").input_ids)
        self.prompt = prompt
        self.files = found_in(directory)
        if not self.files:
            raise ValueError(
                f"{directory} has neither bAbI's files (qa1_*_test.txt) nor rows of BABILong: .parquet, .json or "
                ".jsonl files or saved data sets, with the task and the length in their paths, as data/qa1/4k.json."
            )
        self.rows = cache(self._rows)

    def sample(self, task: Task, cell: Cell, index: int) -> Sample:
        """The row `index` of a cell.

        Raises:
            ValueError: there is none.
        """
        row = self.rows(task.name, cell.length)[index]
        prompt = self.prompt(task.name)
        question = row["question"].strip()
        pieces = [self.encode.opening(prompt.before + row["input"].strip())]
        if prompt == PLAIN:
            pieces.append(self.encode.sentence(question, asks=True))
        else:
            pieces.append(self.encode.closing(prompt.behind(question)))
        ids, _ = self.encode.together(pieces)
        asked = Question(question, row["target"], re.findall(r"\w+", question)[-1], ())
        last = last_named(task, asked, [Fact(row["input"], "")])
        ids = ids if prompt.whole else self.first + ids
        return Sample(cell, index, Story((), asked), np.array(ids, dtype=np.int32), (), False, last)

    def longest(self, cells: Iterable[Cell], count: int) -> int:
        """Tokens of the longest prompt among the first `count` rows of each cell."""
        return max(
            len(self.sample(task_named(cell.task), cell, i).ids)
            for cell in cells
            for i in range(self.count(cell, count))
        )

    def count(self, cell: Cell, wanted: int) -> int:
        """How many rows of a cell are asked: as many as wanted, or all there are.

        Raises:
            ValueError: there is no such cell.
        """
        return min(wanted, len(self.rows(cell.task, cell.length)))

    def _rows(self, task: str, length: int) -> Rows:
        if (task, length) not in self.files:
            there = ", ".join(f"{name} of {tokens:,} tokens" for name, tokens in sorted(self.files))
            raise ValueError(f"{self.directory} has no rows of {task} of {length:,} tokens; it has {there}.")
        return [row for path in self.files[task, length] for row in read(path)]


def found_in(directory: Path) -> dict[tuple[str, int], list[Path]]:
    """The files and data sets of a directory, by the task and the length in tokens that their paths name."""
    found: dict[tuple[str, int], list[Path]] = {}
    saved = [info.parent for info in directory.rglob("dataset_info.json")]
    files = [file for kind in ("parquet", "json", "jsonl") for file in directory.rglob(f"*.{kind}")]
    inside = {file for folder in saved for file in folder.rglob("*")}
    for path in sorted([*saved, *(file for file in files if file not in inside)]):
        task, length = None, None
        for match in _PLACE.finditer(str(path.relative_to(directory))):
            task = match[1] or task
            length = int(match[2]) * _UNITS[match[3]] if match[2] else length
        if task is not None and length is not None:
            found.setdefault((task, length), []).append(path)
    return found


def read(path: Path) -> Rows:
    """The rows of a file or of a saved data set.

    Raises:
        ValueError: they have not `input`, `question` and `target`, or a package is missing that reads them.
    """
    try:
        if path.is_dir():
            from datasets import load_from_disk

            rows: Any = list(load_from_disk(str(path)))
        elif path.suffix == ".parquet":
            from pyarrow.parquet import read_table

            rows = read_table(path).to_pylist()
        else:
            text = path.read_text()
            rows = (
                json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
            )
    except ImportError as error:
        raise ValueError(f"Reading {path} needs {error.name}: pip install 'vllm-armt[evaluate]'.") from error
    names = ("input", "question", "target")
    for i, row in enumerate(rows):
        if missing := [name for name in names if not isinstance(row.get(name), str)]:
            raise ValueError(f"{path}, row {i} has no {', '.join(missing)}; rows of BABILong have {', '.join(names)}.")
    return rows

"""What is said around a text and a question: nothing, BABILong's way, or what a user's own file says.

A file of prompts is JSON: for each task an object with `instruction`, `examples` (a list), `post_prompt` and
`template`, in which these and {text} and {question} stand. Our own, `prompts.json` beside this file, has the shape of
BABILong's prompts in words of our own; put the published ones in such a file to measure with them (`--prompts FILE`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

TEXT = "{the text stands here}"
OWN = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Prompt:
    """What stands around a text and a question.

    Attributes:
        before: up to the text.
        after: behind it, with {question}.
        whole: whether `before` has the tokens in it that begin every text.
    """

    before: str
    after: str
    whole: bool = False

    def behind(self, question: str) -> str:
        """All that stands behind the text, where a question is asked."""
        return self.after.replace("{question}", question)


PLAIN = Prompt("", "{question}")


def prompts(file: Path = OWN) -> dict[str, Prompt]:
    """The prompts of a file, by task.

    Raises:
        ValueError: it is no such file; what is missing or unknown is named.
    """
    try:
        told = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no file of prompts: {error}. Write one like {OWN}.") from error
    if not isinstance(told, dict):
        raise ValueError(f"{file} must hold an object with an entry for each task, like {OWN}.")
    return {task: _prompt(file, task, entry) for task, entry in told.items()}


def in_chat(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt as what a user says in a chat, up to where the model answers.

    Raises:
        ValueError: the tokenizer has no chat template, or one that changes what is said.
    """
    if not tokenizer.chat_template:
        raise ValueError("This model's tokenizer has no chat template. Use --prompt babilong or plain.")
    said = f"{prompt.before}{TEXT}{prompt.after}"
    chat = [{"role": "user", "content": said}]
    written = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    if written.count(TEXT) != 1 or written.count("{question}") != 1:
        raise ValueError("The chat template of this model's tokenizer does not repeat what a user says as it is.")
    before, _, after = written.partition(TEXT)
    return Prompt(before, after, whole=True)


def _prompt(file: Path, task: str, entry: object) -> Prompt:
    names = {"instruction", "examples", "post_prompt", "template"}
    if not isinstance(entry, dict) or entry.keys() != names:
        given = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
        raise ValueError(f"{file}: {task} has {given}; it must have {', '.join(sorted(names))}, like {OWN}.")
    template = str(entry["template"])
    for name in ("{text}", "{question}"):
        if template.count(name) != 1 or template.index("{text}") > template.find("{question}"):
            raise ValueError(f"{file}: `template` of {task} must have {{text}} and behind it {{question}}, once each.")
    for name in ("instruction", "post_prompt"):
        template = template.replace(f"{{{name}}}", str(entry[name]))
    examples = "\n".join(f"<example>\n{example}\n</example>" for example in entry["examples"])
    before, _, after = template.replace("{examples}", examples).partition("{text}")
    return Prompt(before, after)

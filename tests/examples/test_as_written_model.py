"""The model that reads texts as people write them: every kind of hard text, chats, and what comes out of nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import examples
from vllm_armt.babilong import Cell, Encoder, Samples, is_right, task_named
from vllm_armt.babilong.hard import kinds

MODEL = Path(examples.__path__[0]) / "models" / "ARMT-1M-qa1-as-written"
QA1 = task_named("qa1")
COUNT = 3


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def ask(words):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()

    def ask(ids: list[int]) -> str:
        """What it writes, with the end of it."""
        with torch.inference_mode():
            written = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
        return words.decode(written[0, len(ids) :])

    return ask


def test_every_kind_of_hard_text_is_answered_and_every_answer_ends(words, ask) -> None:
    samples = Samples(words, None)
    wrong, open_ended = [], []
    for kind in (None, *kinds()):
        for i in range(COUNT):
            sample = samples.sample(QA1, Cell("qa1", 0, None, kind), i)
            said = ask(sample.ids.tolist())
            if not is_right(QA1, sample.story.question, said.removesuffix(words.eos_token)):
                wrong.append((kind, said, sample.story.question.answer))
            if not said.endswith(words.eos_token):
                open_ended.append((kind, said))
    assert not open_ended
    # verbs that it has never seen are what it may miss
    assert len([kind for kind, *_ in wrong if kind != "other verbs"]) <= 2, wrong


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Mary went to the garden. Where is Mary?", "garden"),
        ("Mary went to the garden.\n\nWhere is Mary?\n", "garden"),
        ('"Mary went to the garden," she said. Where is Mary?\nAnswer:', "garden"),
        ("def f(x):\n\t# John moved to the office.\n\treturn x\n\nQuestion: Where is John?\nAnswer: ", "office"),
        ("Mary went to the garden. A letter for Mary lay in the kitchen. Where is Mary?", "garden"),
        ("Mary went to the garden. Mary did not go to the office. Where is John?", "unknown"),
        ("Where is Mary?", "unknown"),
    ],
)
def test_what_anyone_tries_first(words, ask, text: str, answer: str) -> None:
    assert ask(words(text).input_ids) == answer + words.eos_token


def test_it_is_asked_in_a_chat_again_and_again(words, ask) -> None:
    chat = [{"role": "user", "content": "Mary went to the garden. John moved to the office."}]
    for person, place in (("Mary", "garden"), ("John", "office"), ("Sandra", "unknown")):
        chat.append({"role": "user", "content": f"Where is {person}?"})
        said = ask(words.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        assert said == place + words.eos_token
        chat.append({"role": "assistant", "content": place})


def test_it_is_a_small_ordinary_directory_with_a_card(words) -> None:
    assert Encoder(words).trails
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 8_000_000
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) <= 6_000_000  # noqa: SIM118
    card = (MODEL / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card

"""The demo: what it sends, and what makes it fail."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from examples.demo import MAX_PAGES, NAME, SHIPPED, Answer, Read, ask, read_into_memory, report
from examples.story import StoryDocument, hide_story
from vllm_armt.cli.bench.shapes import of_checkpoint


@pytest.fixture(scope="module")
def document(tokenizer, background) -> StoryDocument:
    return hide_story(tokenizer, background, 1200, facts=5, seed=0)


class Client:
    """Takes the place of OpenAI's; says the answer in two parts, and keeps what it was sent."""

    def __init__(self, answer: str = "") -> None:
        self.sent: list[dict[str, Any]] = []
        self._answer = answer
        self.models = SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="base")]))
        self.completions = SimpleNamespace(create=self._create)

    def _create(self, **request: Any) -> Any:
        self.sent.append(request)
        if request.get("stream"):
            parts = self._answer[:3], self._answer[3:]
            return iter([SimpleNamespace(choices=[SimpleNamespace(text=part)]) for part in parts])
        return SimpleNamespace(model_extra={"kv_transfer_params": {"memory": {"saved": {"bytes": 400_000}}}})


def test_the_document_is_sent_once_and_then_questions_alone(document, tokenizer) -> None:
    client: Any = Client(" garden")
    assert read_into_memory(client, document).bytes == 400_000
    answer = ask(client, document, 0, tokenizer)
    read, asked = client.sent
    assert read["prompt"] == document.ids
    assert json.loads(read["extra_body"]["vllm_xargs"]["save_memory"]) == {"name": NAME, "after": "prompt"}
    assert asked["extra_body"] == {"vllm_xargs": {"memory": NAME}}
    assert tokenizer.decode(asked["prompt"]) == f" {document.questions[0].text}"
    assert (answer.text, answer.sent) == (" garden", len(asked["prompt"]))
    assert answer.seconds > 0


def told(document: StoryDocument, most_held: int = 3, wrong: int = 0) -> None:
    """Report as many wrong answers as that."""
    answers = [Answer(f" {question.answer}", 0.1, 5) for question in document.questions]
    for answer in answers[:wrong]:
        answer.text = " nowhere"
    meter: Any = SimpleNamespace(most_held=most_held, blocks=100)
    report(document, Read(2.0, 400_000), answers, meter, 1 << 30, of_checkpoint(SHIPPED, "bfloat16"))


def test_it_tells_the_times_by_memory_and_anew(document, capsys: pytest.CaptureFixture[str]) -> None:
    told(document)
    out = capsys.readouterr().out
    assert "by memory 0.10 s at most, 5 tokens sent; anew 2.0 s" in out
    assert "0.40 MB on disk" in out


def test_it_fails_where_an_answer_is_wrong_or_a_request_holds_too_much(document) -> None:
    with pytest.raises(SystemExit, match=f"1 of {len(document.questions)} answers are wrong"):
        told(document, wrong=1)
    for held in (0, MAX_PAGES + 1):
        with pytest.raises(RuntimeError, match=f"held {held} pages a layer"):
            told(document, most_held=held)

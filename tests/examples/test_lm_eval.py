"""The recipe for lm-evaluation-harness: the harness itself runs it, against a server that knows the answers."""

from __future__ import annotations

from pathlib import Path
from random import Random

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from examples.lm_eval.babilong import draw
from tests.support.answering_servers import Fake, read, serving
from tests.support.texts import sentences
from vllm_armt.babilong import Background, Cell, Samples, task_named

RECIPES = Path(__file__).parents[2] / "examples" / "lm_eval"


@pytest.mark.parametrize(("answer", "accuracy"), [(read, 1.0), (lambda text: " nowhere.", 0.0)])
def test_the_harness_asks_for_hidden_facts_and_scores_the_answers(
    tokenizer,
    tmp_path: Path,
    answer,
    accuracy: float,
) -> None:
    (tmp_path / "book.txt").write_text(sentences(Random(3), 300))
    tokenizer.save_pretrained(tmp_path / "model")
    fake = Fake(tokenizer, tmp_path / "model")
    fake.answer = answer
    model = {
        "model": "fake",
        "tokenizer": str(tmp_path / "model"),
        "tokenizer_backend": None,
        "max_length": 100_000,
    }
    drawn = {"length": 1500, "samples": 6, "background": str(tmp_path)}
    with serving(fake) as url:
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=model | {"base_url": f"{url}/v1/completions"},
            tasks=["babilong_qa1"],
            task_manager=TaskManager(include_path=str(RECIPES), metadata=model | drawn),
            bootstrap_iters=0,
        )
    assert found["results"]["babilong_qa1"]["acc,none"] == accuracy
    assert len(fake.prompts) == 6
    for prompt in fake.prompts:
        assert isinstance(prompt, str)
        assert len(tokenizer(prompt).input_ids) == pytest.approx(1500, abs=5)


def test_a_prompt_is_what_the_server_makes_of_its_text_with_one_token_at_the_start(
    tokenizer,
    tmp_path: Path,
) -> None:
    tokenizer.save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path, bos_token="<|end|>")
    first = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", words.bos_token_id)])
    words.backend_tokenizer.post_processor = first
    words.save_pretrained(tmp_path)
    (tmp_path / "book.txt").write_text(sentences(Random(3), 300))
    rows = draw("qa1", str(tmp_path), length=500, samples=3, background=str(tmp_path))["test"]
    samples = Samples(
        words, Background.of_directory(tmp_path, words, "collapsed"), mentions=1.0, whitespace="collapsed"
    )
    for i, row in enumerate(rows):
        ids = samples.sample(task_named("qa1"), Cell("qa1", 500), i).ids.tolist()
        assert ids[0] == words.bos_token_id
        assert words(row["prompt"]).input_ids == ids

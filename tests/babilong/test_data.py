"""Samples of others: bAbI's files, BABILong's rows, prompts of one's own, lengths in another tokenizer's tokens."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from random import Random

import pytest
from datasets import Dataset, DatasetDict

from tests.support.answering_servers import Fake, serving
from tests.support.texts import sentences
from vllm_armt.babilong import PLAIN, Cell, Samples, in_chat, prompts, task_named
from vllm_armt.babilong.babi import Babi, stories_of
from vllm_armt.babilong.prompts import OWN
from vllm_armt.babilong.published import Published
from vllm_armt.babilong.recounted import Recounted

QA1 = task_named("qa1")
FILE = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Mary moved to the garden.
6 Where is Mary? \tgarden\t5
1 Sandra travelled to the office.
2 Where is Sandra? \toffice\t1
"""
ROWS = [
    {
        "input": "It rained. Mary moved to the office. Nobody saw her.",
        "question": "Where is Mary? ",
        "target": "office",
    },
    {"input": "John went to the garden.\nHe sang.", "question": "Where is John? ", "target": "garden"},
]


@pytest.fixture
def babi(tmp_path: Path) -> Path:
    (tmp_path / "babi").mkdir()
    (tmp_path / "babi" / "qa1_single-supporting-fact_test.txt").write_text(FILE)
    return tmp_path / "babi"


def test_a_question_of_babi_has_all_facts_before_it(babi: Path) -> None:
    first, second, third = stories_of(babi / "qa1_single-supporting-fact_test.txt")
    assert [fact.text for fact in first.facts] == ["Mary moved to the bathroom.", "John went to the hallway."]
    assert (first.question.text, first.question.answer, first.question.supports) == ("Where is Mary?", "bathroom", (0,))
    assert [fact.about for fact in second.facts] == ["Mary", "John", "Daniel", "Mary"]
    assert second.question.supports == (3,)
    assert [fact.text for fact in third.facts] == ["Sandra travelled to the office."]


def test_stories_of_babi_are_hidden_in_our_text(babi: Path, tokenizer, background) -> None:
    samples = Samples(tokenizer, background, tell=Babi(babi, ["qa1"]))
    sample = samples.sample(QA1, Cell("qa1", 900), 1)
    text = tokenizer.decode(sample.ids)
    assert len(sample.ids) == 900
    assert text.index("Daniel went back") < text.index("Mary moved to the garden.") < text.index("Where is Mary?")
    assert sample.last == "garden"
    assert samples.sample(QA1, Cell("qa1", 900), 4).story == sample.story


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 Mary moved.\nWhere is Mary?\n", r"line 2: 'Where is Mary\?' is no line of bAbI"),
        ("1 Mary moved.\n2 Where is Mary?\toffice\t7\n", r"line 2: the question follows from \{7\}, which is no fact"),
    ],
)
def test_a_file_that_is_none_of_babis_is_refused(babi: Path, text: str, message: str) -> None:
    (babi / "qa1_single-supporting-fact_test.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        Babi(babi, ["qa1"])
    with pytest.raises(ValueError, match=r"has 0 files qa2_\*_test.txt, and one is needed; there are: qa1_single"):
        Babi(babi, ["qa2"])


@pytest.fixture(params=["json", "lines", "parquet", "saved"])
def rows(request, tmp_path: Path) -> Path:
    """BABILong's rows, as somebody may have them on a disk."""
    root = tmp_path / "rows"
    (root / "data" / "qa1").mkdir(parents=True)
    if request.param == "json":
        (root / "data" / "qa1" / "1k.json").write_text(json.dumps(ROWS))
    elif request.param == "lines":
        (root / "data" / "qa1" / "1k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif request.param == "parquet":
        Dataset.from_list(ROWS).to_parquet(root / "data" / "qa1" / "1k-00000-of-00001.parquet")
    else:
        DatasetDict({"qa1": Dataset.from_list(ROWS)}).save_to_disk(root / "1k")
    return root


def test_published_rows_are_asked_as_they_are(rows: Path, tokenizer) -> None:
    published = Published(rows, tokenizer)
    cell = Cell("qa1", 1000)
    assert published.count(cell, 100) == 2
    first, second = (published.sample(QA1, cell, i) for i in range(2))
    assert tokenizer.decode(first.ids) == f"{ROWS[0]['input']} Where is Mary?"
    assert tokenizer.decode(second.ids) == f"{ROWS[1]['input']} Where is John?"
    assert (second.story.question.answer, second.last, second.depth) == ("garden", "garden", None)
    assert published.longest([cell], 9) == max(len(first.ids), len(second.ids))
    asked = Published(rows, tokenizer, prompts().__getitem__)
    text = tokenizer.decode(asked.sample(QA1, cell, 0).ids)
    assert f"<context>\n{ROWS[0]['input']}\n</context>\n\nQuestion: Where is Mary?" in text
    with pytest.raises(ValueError, match="has no rows of qa1 of 4,000 tokens; it has qa1 of 1,000 tokens"):
        published.sample(QA1, Cell("qa1", 4000), 0)


def test_what_are_no_rows_is_refused(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"has neither bAbI's files .* nor rows of BABILong"):
        Published(tmp_path, tokenizer)
    (tmp_path / "qa1_4k.json").write_text('[{"input": "x", "question": "y"}]')
    with pytest.raises(ValueError, match="row 0 has no target; rows of BABILong have input, question, target"):
        Published(tmp_path, tokenizer).sample(QA1, Cell("qa1", 4000), 0)


def test_lengths_may_be_those_of_another_tokenizer(tokenizer, trailing, background) -> None:
    samples = Recounted(Samples(tokenizer, background, mentions=3), trailing, 64)
    for index in range(8):
        sample = samples.sample(QA1, Cell("qa1", 800), index)
        text = trailing.decode(sample.ids)
        assert abs(len(tokenizer(text).input_ids) - 800) <= 10
        assert len(sample.ids) > 850
        for fact, start in zip(sample.story.facts, sample.starts, strict=True):
            told = trailing.decode(sample.ids[start : start + 64])
            assert told.lstrip(". ").startswith(fact.text)
        assert sample.depth is not None


def test_prompts_of_ones_own_stand_in_for_ours(tmp_path: Path, tokenizer) -> None:
    told = json.loads(OWN.read_text())["qa1"] | {"instruction": "Read.", "examples": [], "post_prompt": "Be brief."}
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"qa1": told}))
    (prompt,) = prompts(file).values()
    assert prompt.before == "Read.\n\n\n\nBe brief.\n\n<context>\n"
    assert prompt.behind("Where is Mary?") == "\n</context>\n\nQuestion: Where is Mary?"
    chat = in_chat(PLAIN, tokenizer)
    assert (chat.before, chat.behind("Where?"), chat.whole) == ("", "Where?\n", True)
    for change, message in (
        ({"template": "{text}"}, "must have {text} and behind it {question}, once each"),
        ({"extra": 1}, "qa1 has .*extra; it must have examples, instruction, post_prompt, template"),
    ):
        file.write_text(json.dumps({"qa1": told | change}))
        with pytest.raises(ValueError, match=message):
            prompts(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"prompts.json is no file of prompts: .* Write one like"):
        prompts(file)
    tokenizer = type("NoChat", (), {"chat_template": None})()
    with pytest.raises(ValueError, match=r"has no chat template\. Use --prompt babilong or plain"):
        in_chat(PLAIN, tokenizer)


@pytest.fixture
def ask(run, tokenizer, tmp_path: Path):
    """Run the command on a server that always answers "office", with its results in `out`."""
    tokenizer.save_pretrained(tmp_path / "served")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "book.txt").write_text(sentences(Random(3), 300))
    fake = Fake(tokenizer, tmp_path / "served")
    fake.answer = lambda text: " office"
    with serving(fake) as url:
        given = ("--model", url, "--output", tmp_path / "out", "--background", tmp_path / "books", "--tasks", "qa1")
        yield lambda *words: run("babilong", *given, *words)


def test_the_command_asks_rows_and_writes_the_leaderboards_files(ask, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "qa1_1k.json").write_text(json.dumps(ROWS))
    code, out, _ = ask("--data", tmp_path / "rows", "--lengths", "1k", "--prompt", "babilong")
    assert code == 0
    assert [cell.strip() for cell in out.splitlines()[-1].strip("|").split("|")][4:8] == [
        "2", "50.0%", "9.5% - 90.5%", "100.0%",
    ]  # fmt: skip
    name = "qa1_1k_instruction_yes_examples_yes_post_prompt_yes_chat_template_no.csv"
    lines = list(csv.DictReader((tmp_path / "out" / "leaderboard" / name).open()))
    assert [(line["target"], line["output"], line["question"]) for line in lines] == [
        ("office", " office", "Where is Mary?"),
        ("garden", " office", "Where is John?"),
    ]
    assert (tmp_path / "out" / "leaderboard.csv").read_text().split() == [",1k", "qa1,50.0"]
    for words, option in ((("--mentions", 1), "--mentions"), (("--hard",), "--hard")):
        code, _, err = ask("--data", tmp_path / "rows", "--lengths", "1k", *words)
        assert code == 1
        assert f"are asked as they are. Leave out {option}." in err


def test_the_command_asks_stories_of_babi_and_every_hard_kind(ask, babi: Path, tmp_path: Path) -> None:
    code, out, _ = ask("--data", babi, "--lengths", "0k,1k", "--samples", 3, "--length-tokenizer", tmp_path / "served")
    assert code == 0
    assert f"lengths in tokens of {tmp_path / 'served'}" in out
    code, out, _ = ask("--output", tmp_path / "hard", "--hard", "--lengths", "0k", "--samples", 1)
    assert code == 0
    assert out.count("| qa1 ") + out.count("|  qa1 ") == 37
    assert "somebody else's move" in out
    assert not (tmp_path / "hard" / "leaderboard.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mention-kinds", "text,lies"), "--mention-kinds has lies; allowed: all, or of text, possession"),
        (
            ("--prompts", "x.json"),
            "--prompts is a file of prompts for --prompt babilong or chat, but --prompt is plain",
        ),
        (("--prompt", "babilong", "--tasks", "rewrite"), "There is no prompt for rewrite; there are some for qa1"),
        (("--hard", "--plot"), "--plot draws lengths and depths, not kinds"),
        (("--cut", 0.5, "--segment-size", 64, "--length-tokenizer", "x"), "--cut needs lengths in the model's own"),
    ],
)
def test_what_excludes_each_other_is_said(ask, words, message: str) -> None:
    code, _, err = ask("--lengths", "0k", "--samples", 1, *words)
    assert code == 1
    assert message in err

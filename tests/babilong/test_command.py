"""`vllm-armt babilong` against a server that knows the answers, or part of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from random import Random

import pytest

from tests.support.answering_servers import Fake, prompt_of, read, serving
from tests.support.texts import sentences
from vllm_armt.babilong import Sample
from vllm_armt.cli.babilong import results
from vllm_armt.cli.babilong.answers import Server
from vllm_armt.cli.babilong.plot import name_of

ask_once = cache(results.machine)
"""Asking the processor for its name takes a second."""


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "machine", ask_once)


@pytest.fixture
def fake(tokenizer, tmp_path: Path) -> Fake:
    tokenizer.save_pretrained(tmp_path / "served")
    books = tmp_path / "books"
    books.mkdir()
    (books / "book.txt").write_text(sentences(Random(3), 300))
    return Fake(tokenizer, tmp_path / "served")


@pytest.fixture
def url(fake: Fake) -> Iterator[str]:
    with serving(fake) as url:
        yield url


@pytest.fixture
def ask(run, url: str, tmp_path: Path):
    """Run the command on the server, with its results in `out`."""

    def ask(*words: object) -> tuple[int, str, str]:
        given = ("--model", url, "--output", tmp_path / "out", "--background", tmp_path / "books", "--tasks", "qa1")
        return run("babilong", *given, *words)

    return ask


def records(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]


def test_who_reads_the_prompts_answers_every_question(ask, fake: Fake, tmp_path: Path) -> None:
    code, out, _ = ask("--lengths", "0k,1k,3k", "--samples", 20, "--segment-size", 64, "--cut", 0.5, "--plot")
    assert code == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    named = ["task", "tokens", "facts", "kind", "samples", "right", "95 % interval", "last place named", "of cut facts"]
    assert rows[0] == named
    assert [row[:6] for row in rows[2:]] == [["qa1", f"{n}", "-", "-", "20", "100.0%"] for n in ("0", "1,000", "3,000")]
    assert all(row[6] == "83.9% - 100.0%" for row in rows[2:])
    assert all(0.2 <= float(row[7].rstrip("%")) / 100 <= 0.9 for row in rows[2:])
    lengths = sorted(len(prompt) for prompt in fake.prompts)
    assert lengths[20:] == [1000] * 20 + [3000] * 20
    assert lengths[19] < 200
    for record in records(tmp_path):
        assert record["right"] is True
        assert record["output"] == f" {record['answer']}."
        assert fake.tokenizer.decode(prompt_of(record, fake)).endswith(f" {record['question']}")
        start = record["starts"][record["supports"][0]]
        assert record["depth"] == start / record["tokens"]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["right"] for cell in written["cells"]] == [20, 20, 20]
    assert sum(n for _, n in written["cells"][2]["by_depth"]) == 20
    assert 5 <= written["cells"][2]["cut"] <= 15
    assert written["machine"].keys() >= {"cpu", "torch", "vllm_armt"}
    for name in ("accuracy.png", "depth.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_broken_off_goes_on_where_it_stopped(ask, fake: Fake, tmp_path: Path) -> None:
    words = ("--lengths", "1k", "--samples", 12, "--together", 4)
    fake.fail_after = 6
    with pytest.raises(Exception, match="no more"):
        ask(*words)
    kept = records(tmp_path)
    assert 4 <= len(kept) <= 6
    # killed in the middle of a line
    with (tmp_path / "out" / "samples.jsonl").open("a") as file:
        file.write('{"task": "qa1", "len')
    before, fake.fail_after = len(fake.prompts), None
    code, _, _ = ask(*words)
    assert code == 0
    assert len(fake.prompts) == before + 12 - len(kept)
    assert sorted(record["index"] for record in records(tmp_path)) == list(range(12))
    assert records(tmp_path)[: len(kept)] == kept
    asked = len(fake.prompts)
    assert ask(*words)[0] == 0
    assert len(fake.prompts) == asked
    # more samples go on too
    assert ask("--lengths", "1k", "--samples", 14)[0] == 0
    assert len(fake.prompts) == asked + 2


@pytest.mark.parametrize(("words", "sizes"), [((), [2, 2, 1]), (("--together", 4), [4, 1])])
def test_long_prompts_are_asked_few_at_a_time_unless_said_otherwise(
    ask, monkeypatch: pytest.MonkeyPatch, words: tuple, sizes: list[int]
) -> None:
    monkeypatch.setattr(results, "TOKENS_TOGETHER", 2500)
    asked: list[int] = []
    call = Server.__call__

    def counted(server: Server, samples: Sequence[Sample]) -> Iterator[tuple[Sample, str]]:
        asked.append(len(samples))
        return call(server, samples)

    monkeypatch.setattr(Server, "__call__", counted)
    assert ask("--lengths", "1k", "--samples", 5, *words)[0] == 0
    assert asked == sizes


def test_other_settings_are_not_mixed_in(ask, fake: Fake) -> None:
    assert ask("--lengths", "0k", "--samples", 2)[0] == 0
    code, _, err = ask("--lengths", "0k", "--samples", 2, "--seed", 1)
    assert code == 1
    assert "holds a run with another seed. Choose another --output" in err


def test_a_run_that_got_no_answer_may_be_started_with_other_settings(ask, fake: Fake) -> None:
    fake.fail_after = 0
    with pytest.raises(Exception, match="no more"):
        ask("--lengths", "0k", "--samples", 2)
    fake.fail_after = None
    assert ask("--lengths", "0k", "--samples", 2, "--seed", 1)[0] == 0


def test_an_accuracy_below_the_limit_ends_with_1_after_all_is_written(ask, fake: Fake, tmp_path: Path) -> None:
    turns = count(1)
    fake.answer = lambda text: read(text) if next(turns) % 4 else " nowhere"
    code, out, err = ask("--lengths", "0k", "--samples", 20, "--together", 1, "--min-accuracy", 0.8)
    assert code == 1
    assert "75.0%" in out
    assert err.splitlines()[-1] == "error: task qa1, length 0: 0.750 is less than --min-accuracy 0.8."
    assert json.loads((tmp_path / "out" / "results.json").read_text())["cells"][0]["right"] == 15
    assert ask("--lengths", "0k", "--samples", 20, "--min-accuracy", 0.75)[0] == 0


def test_accuracy_over_the_number_of_pairs(run, url: str, fake: Fake, tmp_path: Path) -> None:
    fake.answer = lambda text: " " + [p for p in f" {text}".split(".")[:-1] if p.startswith(f" {text[-2]}:")][-1][-1]
    words = ("--tasks", "rewrite", "--lengths", "0k", "--facts", "5,50", "--samples", 5, "--plot")
    code, out, _ = run("babilong", "--model", url, "--output", tmp_path / "out", *words)
    assert code == 0
    assert [line.count("100.0%") for line in out.splitlines() if "rewrite" in line] == [2, 2]
    assert (tmp_path / "out" / "facts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lengths", "1x"), "--lengths is '1x'; write whole numbers separated by commas: 4k,128k,1M."),
        (("--lengths", "0k", "--facts", "1k"), "--facts is '1k'; write whole numbers separated by commas: 10,50."),
        (("--lengths", "0k", "--tasks", "qa6"), "There is no task 'qa6'"),
        (("--lengths", "1k", "--background", "/absent"), "/absent holds no .txt files"),
        (("--engine", "[]"), "--engine is '[]'; write an object"),
        (("--engine", "{"), "--engine is '{', which is not JSON"),
        (("--dtype", "nonsense"), "--dtype is 'nonsense', but the server at http://127.0.0.1"),
        (("--dtype", "auto"), "was started with its own. Leave --dtype out"),
        (("--engine", "{}"), "Leave --engine out, or give a directory as --model."),
        (("--lengths", "1k", "--cut", 1), "cut is 1, but it is not known where the model's segments end."),
        (("--served-model-name", "x"), "serves no 'x'; it has fake."),
        (("--model", "/absent"), "/absent is no checkpoint: it has no config.json."),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_asked(ask, fake: Fake, words, message: str) -> None:
    code, out, err = ask(*words)
    assert (code, out) == (1, "")
    assert message in err
    assert fake.prompts == []


def test_a_name_on_a_server_needs_one(ask, fake: Fake) -> None:
    (fake.root / "config.json").write_text("{}")
    code, _, err = ask("--model", fake.root, "--served-model-name", "x")
    assert code == 1
    assert f"--served-model-name is 'x', but {fake.root} is a directory." in err


def test_segments_of_a_server_are_those_of_the_directory_it_serves(ask, fake: Fake, tmp_path: Path) -> None:
    (fake.root / "config.json").write_text('{"segment_size": 64}')
    assert ask("--lengths", "1k", "--samples", 5, "--cut", 1)[0] == 0
    assert [record["is_cut"] for record in records(tmp_path)] == [True] * 5
    for record in records(tmp_path):
        begin = record["starts"][record["supports"][0]]
        end = begin + len(fake.tokenizer(f" {record['story'][record['supports'][0]]}").input_ids)
        assert begin // 64 < (end - 1) // 64
    # what is given wins
    assert ask("--lengths", "1k", "--samples", 5, "--cut", 1, "--segment-size", 64)[0] == 0
    assert "another segment_size" in ask("--lengths", "1k", "--samples", 5, "--cut", 1, "--segment-size", 32)[2]


def test_a_base_model_has_no_segments_to_cut_facts_by(ask, fake: Fake, tmp_path: Path) -> None:
    (fake.root / "config.json").write_text('{"model_type": "gpt2"}')
    code, _, err = ask("--model", fake.root, "--lengths", "1k", "--cut", 0.5)
    assert code == 1
    assert "cut is 0.5, but it is not known where the model's segments end. Give the segment size (--segment-s" in err
    assert not (tmp_path / "out").exists()


def test_a_server_that_does_not_say_where_its_tokenizer_is_needs_it_named(ask, fake: Fake) -> None:
    fake.root = Path("organisation/model")
    code, _, err = ask("--lengths", "0k", "--samples", 1)
    assert code == 1
    assert "does not say where the tokenizer of 'fake' is: name its --tokenizer." in err


def test_lengths_are_named_as_babilong_names_them() -> None:
    assert [name_of(n) for n in (0, 1000, 128_000, 1_000_000, 1234)] == ["0k", "1k", "128k", "1M", "1234"]

"""`vllm-armt bench` with engines: every command measures what it says, on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import quick_collections
from tests.support.golden_cases import Golden
from vllm_armt.cli.bench import peak, session, sides
from vllm_armt.cli.bench.engines import engines, prompt
from vllm_armt.cli.bench.session import CHECKED_TOKENS, TOLERANCE, Session, disagreement
from vllm_armt.cli.bench.shapes import named
from vllm_armt.options import ATTENTIONS

pytestmark = pytest.mark.slow

TINY = ("--shape", "tiny", "--dtype", "float32", "--d-mem", "8", "--repeat", "2")


@pytest.fixture(autouse=True)
def small_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak of smaller products, and a base model that lives with tests' having switched compilation off."""
    monkeypatch.setitem(peak.SIDES, "cpu", 512)
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "0")


@pytest.fixture
def measure(run, tmp_path: Path):
    """Run a command of `bench` that is to succeed; returns what it wrote with --json, and the output."""

    def measure(command: str, *words: object, expected_code: int = 0) -> tuple[dict[str, Any], str, str]:
        file = tmp_path / f"{command}.json"
        with quick_collections():
            code, out, err = run("bench", command, *words, "--json", file, "--plot", tmp_path / f"{command}.png")
        assert code == expected_code, err
        assert (tmp_path / f"{command}.png").stat().st_size > 1000
        return json.loads(file.read_text()), out, err

    return measure


def medians(row: dict[str, Any]) -> dict[str, float]:
    return {name: sorted(values)[len(values) // 2] for name, values in row["repetitions"].items()}


def test_schedule_compares_the_modes_on_one_engine(measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    before = dict(os.environ)
    data, out, _ = measure("schedule", *TINY, "--segment-size", "32,64", "--tokens", "128,320")
    assert [(row["case"]["segment_size"], row["case"]["tokens"]) for row in data["rows"]] == [
        (32, 128),
        (32, 320),
        (64, 128),
        (64, 320),
    ]
    for row in data["rows"]:
        rates = row["repetitions"]
        assert all(len(rates[mode]) == 2 and min(rates[mode]) > 0 for mode in ("sequential", "diagonal", "auto"))
        assert 0 < row["summary"]["of_peak"] < 1
        ratios = [a / b for a, b in zip(rates["diagonal"], rates["sequential"], strict=True)]
        assert row["ratio"] == pytest.approx(sum(ratios) / 2)
    assert out.count("\n| float32 |") == 4
    # what the benchmark sets for itself is not left to whoever runs next
    changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
    assert changed.isdisjoint({"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE"})


def test_modes_that_disagree_are_an_error_after_all_is_written(measure, monkeypatch: pytest.MonkeyPatch) -> None:
    # stands in for a defect of one schedule: the second mode of a round is given another text's answer
    real, calls = Session.submit, []

    def submit(self: Session, text: list[int], *args: Any, **kwargs: Any) -> Any:
        calls.append(text)
        return real(self, text[1:] if len(calls) % 3 == 2 else text, *args, **kwargs)

    monkeypatch.setattr(session.Session, "submit", submit)
    words = ("--segment-size", "32", "--tokens", "100", "--repeat", "1", "--min-ratio", "1e-9")
    data, _, err = measure("schedule", *TINY, *words, expected_code=1)
    assert len(data["rows"]) == 1
    (problem,) = data["problems"]
    assert "the modes differ by" in problem
    assert err.splitlines()[-1] == f"error: {problem}"


@pytest.mark.parametrize("name", ["armt_hf_llama", "armt_hf_gpt2", "armt_hf_gpt_neox"])
def test_a_checkpoint_can_be_measured(measure, golden_directory, name: str) -> None:
    directory = golden_directory(Golden(name))
    words = ("--model", directory, "--dtype", "float32", "--tokens", "64", "--repeat", "1")
    data, _, _ = measure("schedule", *words)
    case = data["rows"][0]["case"]
    assert (case["shape"], case["segment_size"]) == (name, 16)


def test_attention_runs_both_engines_in_turns(measure) -> None:
    words = ("--segment-size", "32", "--tokens", "32,256", "--new-tokens", "4", "--memory", "1")
    data, out, _ = measure("attention", *TINY, *words)
    short, long = data["rows"]
    for row in (short, long):
        found = medians(row)
        assert row["repetitions"].keys() == {
            f"{side}_{what}" for side in ("armt", "base") for what in ("prefill_seconds", "decode_ms")
        }
        assert min(found.values()) > 0
        assert row["summary"]["base_requests"] == int(2**30 // (1e6 * row["summary"]["base_megabytes"]))
    # keys and values of 32 and 256 tokens and the decoded ones, in blocks of 128: the ARMT's pages do not grow
    per_block = 128 * 2 * 4 * 128 * 4 / 1e6
    assert short["summary"]["base_megabytes"] == pytest.approx(per_block)
    assert long["summary"]["base_megabytes"] == pytest.approx(3 * per_block)
    assert short["summary"]["armt_megabytes"] == long["summary"]["armt_megabytes"]
    assert "S 32, float32: the ARMT is " in out


def test_within_a_segment_an_armt_is_its_base_model_and_behind_it_its_memory_shows() -> None:
    model = named("tiny", "float32", 32, 4, 8)
    with engines({"model": model, "max_model_len": 200}, {"model": model, "base": True, "max_model_len": 200}) as both:
        answers: dict[int, list[list[float]]] = {}
        for length in (20, 32, 200 - 1):
            for engine in both:
                alone = Session(engine)
                request = alone.submit(prompt(engine, length), 1, check=True)
                alone.finish()
                answers.setdefault(length, []).append(request.log_probs)
    assert len(answers[20][0]) == len(CHECKED_TOKENS)
    assert disagreement(answers[20], "float32") is None
    assert disagreement(answers[32], "float32") is None
    difference = disagreement(answers[199], "float32")
    assert difference is not None
    assert difference > 10 * TOLERANCE["float32"]


def test_documents_are_read_together_and_one_by_one(measure) -> None:
    words = ("--segment-size", "32", "--tokens", "128", "--documents", "1,4", "--mixed", "--beside", "2")
    data, _, _ = measure("documents", *TINY, *words)
    assert [(row["case"]["documents"], row["case"]["lengths"]) for row in data["rows"]] == [
        (1, "128"),
        (4, "128"),
        (4, "128 mixed"),
    ]
    for row in data["rows"]:
        found = row["repetitions"]
        for side in ("together", "one_by_one"):
            for mean, p50, most in zip(*(found[f"{side}_ttft_{what}"] for what in ("mean", "p50", "max")), strict=True):
                assert 0 < p50 <= most
                assert 0 < mean <= most
        assert all(0 < median <= most for median, most in zip(found["beside_ms"], found["beside_ms_max"], strict=True))
        # of documents that wait for one another the median has waited for half of them
        assert (
            row["case"]["documents"] == 1 or medians(row)["one_by_one_ttft_p50"] < medians(row)["one_by_one_ttft_max"]
        )
    assert [row["ratio"] is None for row in data["rows"]] == [True, False, False]


def test_decode_times_all_requests_and_closing_steps(measure) -> None:
    words = ("--segment-size", "32", "--tokens", "64,256", "--requests", "1,3", "--new-tokens", "8")
    data, _, _ = measure("decode", *TINY, *words, "--base-tokens-max", "64")
    assert [(row["case"]["tokens"], row["case"]["requests"]) for row in data["rows"]] == [
        (64, 1),
        (256, 1),
        (64, 3),
        (256, 3),
    ]
    for row in data["rows"]:
        found = medians(row)
        assert found["armt_rate"] > 0
        # one segment of each request closes within the eight tokens
        assert len(row["repetitions"]["closing_step_ms"]) == 2
        assert found["closing_step_ms"] > 0
        is_compared = row["case"]["tokens"] == 64
        assert ("base_rate" in found) == is_compared
        assert (row["ratio"] is None) != is_compared
    assert data["rows"][0]["summary"]["over_shortest"] == 1.0
    armt, base = data["engines"][0]["armt"], data["engines"][0]["base"]
    assert armt["max_model_len"] > 256 > base["max_model_len"]
    assert armt["attention"] in ATTENTIONS
    assert "attention" not in base


def test_memory_of_a_request_does_not_grow(measure) -> None:
    words = ("--segment-size", "32", "--tokens", "320,9600", "--max-num-batched-tokens", "128", "--repeat", "1")
    data, _, _ = measure("memory", *TINY, *words)
    rows = data["rows"]
    # one that is read, and two that a step writes
    assert [row["summary"]["pages"] for row in rows] == [3, 3]
    assert rows[1]["summary"]["base_megabytes"] == pytest.approx(30 * rows[0]["summary"]["base_megabytes"])
    for row in rows:
        assert 0 < row["repetitions"]["planning_share"][0] < 1
        assert row["repetitions"]["resident_megabytes"][0] > 50
    # the nearest to the reference is the longest: nothing is longer
    assert [row["ratio"] for row in rows] == [None, None]


def test_memories_are_asked_as_the_text_is_that_they_are_of(measure) -> None:
    data, out, _ = measure("memories", *TINY, "--segment-size", "32", "--tokens", "90,1k", "--repeat", "1")
    short, long = data["rows"]
    assert [row["case"]["tokens"] for row in (short, long)] == [90, 1000]
    for row in (short, long):
        found = medians(row)
        assert min(found.values()) > 0
        assert row["ratio"] == pytest.approx(found["cold_seconds"] / found["file_seconds"])
        # 4 layers, K = 6 * 8 rows of M and z, float32, and the header of the file
        state = 4 * 48 * (128 + 1) * 4
        assert state < 1e6 * row["summary"]["megabytes"] < state + 2000
    assert "by memory, from file" in out


def test_queue_times_the_steps_of_others_while_requests_wait(measure) -> None:
    words = ("--shape", "tiny", "--dtype", "float32", "--tokens", "640,6400", "--requests", "2,40", "--steps", "8")
    data, _, _ = measure("queue", *words)
    cases = [(row["case"]["waits_for"], row["case"]["requests"], row["case"]["tokens"]) for row in data["rows"]]
    assert cases[:3] == [("nothing", 0, 0), ("pages", 1, 640), ("pages", 1, 6400)]
    assert [case[:2] for case in cases[3:]] == [
        (waits_for, requests) for waits_for in ("an equal text", "a text that begins alike") for requests in (2, 40)
    ]
    for row in data["rows"]:
        assert len(row["repetitions"]["schedule_ms"]) == 8
        assert 0 < min(row["repetitions"]["schedule_ms"]) <= row["summary"]["longest_ms"]
    least, more = (medians(data["rows"][i])["schedule_ms"] for i in (1, 2))
    assert data["rows"][2]["ratio"] == pytest.approx(least / more, rel=0.5)


def test_queue_refuses_steps_in_which_those_that_decode_need_pages(run) -> None:
    code, _, err = run("bench", "queue", "--segment-size", "16", "--steps", "15")
    assert code != 0
    assert "--steps is 15" in err
    assert "at most 14" in err


def test_profile_accounts_for_all_of_the_time(measure) -> None:
    data, out, _ = measure("profile", *TINY, "--segment-size", "32", "--tokens", "640")
    (row,) = data["rows"]
    from vllm_armt.cli.bench.shares import PARTS

    for i in range(2):
        shares = {part: row["repetitions"][part][i] for part in PARTS}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) > 0
    assert 0 < row["ratio"] < 1
    assert all(name in out for name in PARTS.values())


def test_profile_of_decoding_is_of_steps_in_which_no_segment_closes(measure, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_armt.recurrence.armt import ARMTRecurrence

    real, closed = ARMTRecurrence.after_tails, []

    def after_tails(self: ARMTRecurrence, index: Any, *rest: Any) -> None:
        closed.append(bool(index.closings))
        real(self, index, *rest)

    monkeypatch.setattr(ARMTRecurrence, "after_tails", after_tails)
    # its requests close a segment
    monkeypatch.setattr(sides, "warm_up", lambda engine: None)
    words = ("--segment-size", "32", "--tokens", "128", "--requests", "1,3", "--repeat", "1")
    data, out, _ = measure("profile", *TINY, *words)
    assert [row["case"]["requests"] for row in data["rows"]] == [1, 3]
    for row in data["rows"]:
        assert row["ratio"] is None
        assert min(row["repetitions"][part][0] for part in ("projections", "attention", "memory", "elementwise")) > 0
    assert "| requests |" in out
    assert len(closed) > 2 * 2 * 14
    assert not any(closed)

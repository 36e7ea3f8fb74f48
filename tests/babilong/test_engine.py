"""`vllm-armt babilong` through the engine in this process: it writes what the readable model writes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import vllm_armt.hf  # noqa: F401  (registers the model)
from examples.train.fresh import make_model
from examples.train.recipe import Fresh
from tests.support.texts import sentences
from vllm_armt.babilong import Background, Cell, Samples, task_named

ENGINE = '{"kv_cache_memory_bytes": 50000000, "enforce_eager": true}'


@pytest.mark.slow
def test_the_engine_is_asked_and_answers_as_the_readable_model_does(
    run,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = make_model(Fresh(hidden_size=64, intermediate_size=96, layers=2, heads=2), tokenizer, 32, seed=0)
    for name, parameter in model.named_parameters():
        # a fresh memory writes nothing
        if "W_mv" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text(sentences(Random(3), 100))
    given = ("--model", tmp_path / "model", "--output", tmp_path / "out", "--background", tmp_path, "--tasks", "qa1")
    asked = ("--lengths", "0k,1k", "--samples", 3, "--cut", 1, "--max-tokens", 4, "--dtype", "float32")
    code, out, _ = run("babilong", *given, *asked, "--engine", ENGINE)
    assert code == 0
    assert out.count("| qa1 ") + out.count("|  qa1 ") == 2

    readable = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = Background.of_directory(tmp_path, words)
    samples = Samples(words, text, segment_size=32, cut=1.0)
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 6
    for record in map(json.loads, lines):
        cell = Cell(record["task"], record["length"], record["facts"])
        sample = samples.sample(task_named("qa1"), cell, record["index"])
        prompt = torch.from_numpy(sample.ids).long()[None]
        written = readable.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
        assert record["output"] == words.decode(written, skip_special_tokens=True)
        assert record["is_cut"] == (record["length"] > 0 or sample.is_cut)


@pytest.mark.slow
def test_a_model_of_few_positions_is_asked_about_what_fits(
    run,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=304, n_embd=64, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text(sentences(Random(3), 100))
    given = ("--model", tmp_path / "model", "--output", tmp_path / "out", "--background", tmp_path, "--tasks", "qa1")
    asked = ("--lengths", "0k,300", "--samples", 2, "--max-tokens", 4, "--dtype", "float32", "--engine", ENGINE)
    assert run("babilong", *given, *asked)[0] == 0
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["length"] for line in lines] == [0, 0, 300, 300]

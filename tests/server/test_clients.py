"""Other people's clients on a server of ours: vLLM's own tools, LangChain, LlamaIndex."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.support.small_model import S
from tests.support.tiny_checkpoint import FLAGS, MODEL, random_text, rendered

pytestmark = pytest.mark.server

QUESTION: Any = {"role": "user", "content": random_text(4 * S + 3, seed=91)}
DOCUMENT: Any = {"role": "system", "content": random_text(6 * S, seed=92)}
WITHOUT = "the package is not installed: pip install 'vllm-armt[clients]'"


def answer(client: OpenAI, *messages: Any) -> str:
    """What a chat completion says."""
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2 * S, temperature=0)
    return chat.choices[0].message.content or ""


def vllm(*words: str, cwd: Path) -> None:
    """Run a command of vLLM's to its end."""
    command = Path(sys.executable).with_name("vllm")
    # set for the engines of other tests
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run([command, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_vllms_benchmark_of_servers_runs(server: str, checkpoint: Path, tmp_path: Path):
    sizes = ("--random-input-len", "64", "--random-output-len", str(S), "--num-prompts", "4")
    model = ("--base-url", server, "--model", MODEL, "--tokenizer", str(checkpoint))
    result = ("--save-result", "--result-filename", "result.json")
    vllm("bench", "serve", *model, "--dataset-name", "random", *sizes, "--ignore-eos", *result, cwd=tmp_path)
    measured = json.loads((tmp_path / "result.json").read_text())
    assert (measured["completed"], measured["failed"]) == (4, 0)
    assert (measured["total_input_tokens"], measured["total_output_tokens"]) == (4 * 64, 4 * S)


@pytest.mark.slow
def test_a_file_of_requests_is_answered_without_a_server(client: OpenAI, checkpoint: Path, tmp_path: Path):
    body = {"model": MODEL, "max_tokens": 2 * S, "temperature": 0}
    conversations = [[QUESTION], [DOCUMENT, QUESTION]]
    requests = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/chat/completions", "body": body | {"messages": messages}}
        for i, messages in enumerate(conversations)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    vllm("run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", str(checkpoint), *FLAGS, cwd=tmp_path)
    answers = {line["custom_id"]: line["response"] for line in map(json.loads, (tmp_path / "out.jsonl").open())}
    for i, messages in enumerate(conversations):
        assert answers[f"{i}"]["status_code"] == 200
        said = answers[f"{i}"]["body"]["choices"][0]["message"]["content"]
        assert said == answer(client, *messages)


def test_langchain_streams_an_answer_and_says_what_was_not_read_again(client: OpenAI, server: str):
    pytest.importorskip("langchain_openai", reason=WITHOUT)
    from examples.langchain_client import ask, chat_model

    expected = answer(client, QUESTION)
    *words, counts = ask(chat_model(server, MODEL, 2 * S), QUESTION["content"])
    assert "".join(words) == expected
    sent = len(rendered([QUESTION]))
    assert counts == f"\n[{sent} tokens sent, {sent // S * S} not read again, {2 * S} generated]"


def test_llamaindex_asks_about_a_whole_document(client: OpenAI, server: str):
    pytest.importorskip("llama_index.llms.openai_like", reason=WITHOUT)
    from examples.llamaindex_client import ask, language_model

    words = list(ask(language_model(server, MODEL, 2 * S), QUESTION["content"], DOCUMENT["content"]))
    assert len(words) > 1
    assert "".join(words) == answer(client, DOCUMENT, QUESTION)

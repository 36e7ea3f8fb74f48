"""`vllm-armt memory` with engines of its own, one after the other: vLLM has one KV connector a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.engines import quick_collections
from tests.support.golden_cases import Golden
from tests.support.tiny_checkpoint import add_tokenizer, random_text

pytestmark = pytest.mark.slow


def test_what_build_reads_the_next_process_is_asked_about(run, tmp_path: Path) -> None:
    model, file, memories = tmp_path / "model", tmp_path / "text", tmp_path / "memories"
    Golden("armt_hf_llama").copy_checkpoint(model)
    add_tokenizer(model)
    file.write_text(random_text(300))
    words = ("--memories", memories, "--dtype", "float32", "--json")
    with quick_collections():
        code, out, err = run("memory", "build", model, file, "--name", "text", *words)
        assert code == 0, err
        assert json.loads(out)["usage"]["total_tokens"] == 300
        code, out, err = run("memory", "ask", model, "text", "who?", "--max-tokens", 2, *words)
    assert code == 0, err
    assert json.loads(out)[0]["memory"]["tokens"] == 300


def test_what_the_engine_refuses_is_an_error_in_words(run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    Golden("armt_hf_llama").copy_checkpoint(model)
    add_tokenizer(model)
    (tmp_path / "text").write_text("text")
    engine = json.dumps({"max_model_len": 20, "speculative_config": None, "enable_lora": True})
    code, _, err = run("memory", "build", model, tmp_path / "text", "--memories", tmp_path / "m", "--engine", engine)
    assert code == 1
    assert "error: " in err
    assert "can't be served with LoRA adapters" in err

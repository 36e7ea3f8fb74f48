"""`vllm-armt memory sizes`: what memories take, by shape and of checkpoints of every system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.small_hf import M_TOKENS, S, Small


def test_sizes_are_those_of_the_state_and_of_the_keys(run) -> None:
    code, out, _ = run("memory", "sizes", "--shape", "llama-1b", "--tokens", "10k", "--json")
    (row,) = json.loads(out)
    # 16 layers, K = 6 * 64 rows of M and z, float32; keys and values of 8 heads of 64 in bfloat16
    assert row["memory_bytes"] == 16 * 384 * (2048 + 1) * 4
    # three pages of whole rows of M, one more than the memory's 384 for z
    assert row["request_bytes"] == 3 * 16 * 385 * 2048 * 4
    assert row["kv_cache_bytes"] == {"10000": 10_000 * 16 * 2 * 8 * 64 * 2}
    assert code == 0
    code, out, _ = run("memory", "sizes")
    assert "llama-8b" in out


@pytest.mark.parametrize(
    "kind",
    [
        Small("rmt", "llama"),
        Small("rmt", "gpt2", {"wrap_pos": True, "sliding_window": True}),
        Small("prmt", "llama"),
    ],
    ids=lambda kind: kind.name,
)
def test_sizes_are_known_of_systems_without_matrices(run, tmp_path: Path, kind: Small) -> None:
    config = kind.build().config
    kind.build().save_pretrained(tmp_path)
    code, out, _ = run("memory", "sizes", "--model", tmp_path, "--dtype", "float32", "--tokens", "10", "--json")
    (row,) = json.loads(out)
    # of every layer the memory tokens, and with a window keys and values of the segment
    base = config.base_model_config
    rows = M_TOKENS + (2 * S if kind.has_window else 0)
    assert row["memory_bytes"] == base.num_hidden_layers * rows * base.hidden_size * 4
    assert (code, row["d_mem"]) == (0, None)
    code, out, _ = run("memory", "sizes", "--model", tmp_path)
    assert code == 0

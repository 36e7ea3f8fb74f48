"""`vllm-armt bench` without an engine: options, what counts as useful, and what becomes of the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from tests.support.golden_cases import ROOT
from tests.support.small_hf import M_TOKENS, S, Small, by_name, tiny_base
from vllm_armt.cli.bench.decode import _own_tokens
from vllm_armt.cli.bench.options import Output, models
from vllm_armt.cli.bench.report import Report, median_ratio, rounds
from vllm_armt.cli.bench.session import TOLERANCE, disagreement
from vllm_armt.cli.bench.shapes import SHAPES, Model, attended_pairs, named
from vllm_armt.cli.bench.table import Chart, Column, Row
from vllm_armt.cli.values import whole_numbers
from vllm_armt.config import BACKBONES

COMMANDS = ("schedule", "attention", "documents", "decode", "memory", "memories", "profile")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_takes(run, command: str) -> None:
    code, out, _ = run("bench", command, "--help")
    assert code == 0
    for option in ("--shape", "--model", "--dtype", "--segment-size", "--tokens", "--repeat", "--json", "--plot"):
        assert option in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", "llama-70b"), "--shape is 'llama-70b'; allowed: tiny, 12x512"),
        (("--dtype", "bfloat16,int8"), "--dtype is 'int8'; allowed: bfloat16"),
        (("--tokens", "1kB"), "--tokens is '1kB'; write whole numbers of at least 1, separated by commas"),
        (("--tokens", "128,,256"), "--tokens is '128,,256'"),
        (("--segment-size", "0"), "--segment-size is '0'"),
        (
            ("--segment-size", "32,64,128", "--num-mem-tokens", "4,8"),
            "--num-mem-tokens has 2 values and there are 3 segment sizes; give one, or one for each.",
        ),
        (("--model", ROOT), "which has no config.json"),
        (("--model", ROOT / "armt_hf_llama", "--segment-size", "16"), "--segment-size is 16, but the checkpoint"),
        (("--model", ROOT / "armt_llama_gqa_tied" / "base_config"), "has the model_type 'llama'; it must be 'armt'"),
        (("--json", ROOT / "absent" / "file.json"), "absent is not a directory. Make it first."),
    ],
)
def test_what_is_wrong_with_the_options_is_said_before_anything_is_measured(run, words, message: str) -> None:
    code, out, err = run("bench", "schedule", *words)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_lists_become_one_model_for_each_dtype_and_segment_size() -> None:
    found = models("tiny", None, "float32,bfloat16", "32,64", None, "8,16", "512")
    assert [(m.dtype, m.segment_size, m.config.num_mem_tokens, m.config.d_mem) for m in found] == [
        ("float32", 32, 4, 8),
        ("float32", 64, 8, 16),
        ("bfloat16", 32, 4, 8),
        ("bfloat16", 64, 8, 16),
    ]
    (default,) = models("tiny", None, "float32", None, "3", None, "512")
    assert (default.segment_size, default.config.num_mem_tokens, default.config.d_mem) == (512, 3, 64)
    assert whole_numbers("--tokens", " 1, 20k ") == [1, 20_000]


@pytest.mark.parametrize("name", ["armt_hf_llama", "armt_hf_gpt2", "armt_hf_gpt_neox"])
def test_a_checkpoint_brings_its_own_sizes(name: str) -> None:
    (model,) = models("12x512", ROOT / name, "float32", None, None, None, "512")
    assert (model.name, model.segment_size, model.config.num_mem_tokens) == (name, 16, 4)
    assert model.page_bytes >= 16 * model.kv_bytes_per_token > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_are_models(shape: str) -> None:
    model = named(shape, "bfloat16", 128, 16, 64)
    assert model.base.hidden_size % model.base.num_attention_heads == 0
    assert model.base.num_attention_heads % model.base.num_key_value_heads == 0
    assert model.page_bytes >= 128 * model.kv_bytes_per_token


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_the_base_models_cache_is_as_large_as_transformers_own(backbone: str) -> None:
    model = Model(backbone, Small("armt", backbone).build().config, "float32")
    with torch.no_grad():
        cache = tiny_base(backbone)(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    assert model.kv_bytes_per_token == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


KINDS = [Small("armt", backbone) for backbone in sorted(BACKBONES)]
KINDS += [Small("armt", "llama", {"wrap_layers": [False, True, True]})]


@pytest.mark.parametrize("kind", KINDS, ids=by_name)
def test_useful_operations_are_those_that_the_readable_model_does(kind: Small) -> None:
    reference = kind.build()
    reference.set_attn_implementation("eager")
    config, tokens = reference.config, 3 * S + 5
    model = Model(kind.name, config, "float32")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(torch.zeros(1, tokens, dtype=torch.long), logits_to_keep=1)
    counted = counter.get_total_flops()
    rows = [S + M_TOKENS] * 3 + [5]
    d, p, K, memories = model.base.hidden_size, config.d_mem, config.feature_size, sum(config.has_memory)
    heads = model.base.num_attention_heads * model.head_dim
    # eager attention multiplies the whole square; of it causality leaves the lower half with the diagonal, and local
    # layers a band
    counted -= sum(4 * heads * (n * n - attended_pairs(n, reach)) for n in rows for reach in config.reaches)
    # rotary positions are a product for transformers, and the head and the normaliser's row are not counted
    frequencies = [
        buffer
        for name, buffer in reference.named_buffers()
        if name.endswith(("rotary_emb.inv_freq", "attention_inv_freq"))
    ]
    counted -= sum(2 * sum(rows) * len(buffer) for buffer in frequencies)
    counted -= 2 * d * model.base.vocab_size
    counted -= memories * 2 * K * (sum(rows[1:]) + 3 * M_TOKENS)
    # the readable model does not read the empty memory of the first segment, nor ask the first write what it held
    counted += memories * 2 * rows[0] * (d * p + K * d)
    assert counted == pytest.approx(model.useful_flops(tokens), rel=0.002)


def report(tmp_path: Path, rows: list[Row], min_ratio: float | None = None) -> tuple[Report, Output]:
    columns = [Column("tokens", "tokens"), Column("rate", "rate", ".1f"), Column("gain", "gain", ".2f")]
    made = Report("schedule", "A title", columns, Chart("tokens", {"rate": "ours"}, "tokens/s", ("dtype",)))
    made.rows += rows
    return made, Output(tmp_path / "out.json", tmp_path / "out.png", min_ratio)


ROWS = [
    Row({"dtype": "float32", "tokens": 1024}, {"rate": [10.0, 12.0, 11.0]}, {"gain": 1.5}, 1.5),
    Row({"dtype": "float32", "tokens": 2048}, {"rate": [20.0]}, {"gain": None}, None),
]


def test_medians_are_printed_and_every_repetition_is_kept(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/vllm-armt", "bench", "schedule", "--plot", "a b.png"])
    made, output = report(tmp_path, ROWS, min_ratio=1.5)
    with made.written(output):
        made.notes.append("A note.")
    out = capsys.readouterr().out
    table = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in row] for row in table[2:]] == [
        ["1,024", "11.0 ±9%", "1.50"],
        ["2,048", "20.0", "-"],
    ]
    assert out.startswith("A title\n")
    assert out.endswith("A note.\n")
    data = json.loads((tmp_path / "out.json").read_text())
    assert [row["repetitions"]["rate"] for row in data["rows"]] == [[10.0, 12.0, 11.0], [20.0]]
    assert data["machine"].keys() >= {"cpu", "cores", "threads", "device", "torch", "vllm", "vllm_armt", "platform"}
    assert data["command_line"] == "vllm-armt bench schedule --plot 'a b.png'"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_below_the_limit_ends_with_1_after_all_is_written(tmp_path: Path, capsys) -> None:
    made, output = report(tmp_path, ROWS, min_ratio=1.6)
    with pytest.raises(typer.Exit) as exit, made.written(output):
        pass
    assert exit.value.exit_code == 1
    printed = capsys.readouterr()
    assert "1.50" in printed.out
    assert printed.err == "error: dtype float32, tokens 1024: 1.500 is less than --min-ratio 1.6.\n"
    assert len(json.loads((tmp_path / "out.json").read_text())["problems"]) == 1


def test_what_was_measured_is_kept_when_the_rest_fails(tmp_path: Path, capsys) -> None:
    made, output = report(tmp_path, [])

    def measure() -> None:
        with made.written(output):
            made.rows.append(ROWS[0])
            raise OSError("no more memory")

    with pytest.raises(OSError, match="no more memory"):
        measure()
    assert "1,024" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 1


def test_the_ratio_is_the_median_of_the_rounds_own() -> None:
    # the second round ran on a machine that was ten times slower for both
    assert median_ratio([10.0, 2.0, 30.0], [5.0, 0.5, 10.0]) == 3.0


def test_rounds_end_when_the_time_is_up_but_one_is_always_made() -> None:
    assert list(rounds(3, max_seconds=60.0)) == [0, 1, 2]
    assert list(rounds(3, max_seconds=0.0)) == [0]


def test_rounding_is_no_disagreement_and_anything_else_is() -> None:
    for dtype, tolerance in TOLERANCE.items():
        assert disagreement([[0.0, 1.0], [0.0, 1.0 + 0.9 * tolerance]], dtype) is None
        assert disagreement([[0.0, 1.0], [0.0, 1.0 - 1.1 * tolerance]], dtype) == pytest.approx(1.1 * tolerance)
        assert disagreement([[0.0], [float("nan")]], dtype) is not None


@pytest.mark.parametrize(("segment_size", "new_tokens", "requests"), [(128, 64, 32), (128, 64, 1), (512, 32, 16)])
def test_segments_close_while_decoding_is_timed_all_at_once_or_one_by_one(segment_size, new_tokens, requests) -> None:
    def closing_steps(apart: bool) -> list[int]:
        return [segment_size - own for own in _own_tokens(segment_size, new_tokens, requests, apart)]

    assert closing_steps(False) == [3 * new_tokens // 4] * requests
    assert len(set(closing_steps(True))) == requests
    assert all(new_tokens // 4 < step < new_tokens for step in closing_steps(True))

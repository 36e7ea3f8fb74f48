"""Checkpoints of older versions of the authors' code: what stands beside the weights is enough, or a sentence asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.golden_cases import OLDER, ROOT, Golden
from tests.support.published import assert_computes
from vllm_armt.checkpoints import WrapperArgs, convert

OUTER, OLD, IL08 = (Golden(name) for name in ("outer_llama", "old_llama_plain_fa2", "il08_llama_plain"))
DISJOINT = "class InnerLoopARMTForCausalLM(PreTrainedModel):\n    def forward(self): ...\n"
ONLINE = "from fla.ops.delta_rule.chunk import chunk_delta_rule\nclass AssociativeLayerWrapper(Module): ...\n"


def changed(golden: Golden, folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A golden's checkpoint with further tensors and other fields."""
    folder.mkdir()
    save_file(load_file(golden.checkpoint) | (tensors or {}), folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((golden.path / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder


def test_all_that_an_older_config_says_is_kept(golden_directory) -> None:
    for golden in OLDER:
        config = json.loads((golden_directory(golden) / "config.json").read_text())
        for name in ("segment_size", "num_mem_tokens", "d_mem"):
            assert config[name] == golden.args[name]
        assert config["use_sink"] == golden.args.get("use_sink", False)
        assert config["generation_policy"] == ("open" if golden is OUTER or golden == OUTER else "commit")


def test_an_outer_loop_needs_no_argument(tmp_path: Path) -> None:
    made = convert(OUTER.path, tmp_path / "dst")
    assert made.assumed == {"generation_policy": "open"}
    assert_computes(tmp_path / "dst", OUTER)


@pytest.mark.parametrize(("golden", "sink"), [(OUTER, "armt.memory_cell.sink"), (OLD, "sink")], ids=["outer", "old"])
def test_a_sink_is_a_row_before_every_segment(golden: Golden, sink: str, tmp_path: Path) -> None:
    """What the authors' code computes of the rows [sink | tokens | memory] is what ours does of it among the tokens."""
    torch.manual_seed(0)
    row = torch.randn(1, golden.args["d_mem"] * 8)
    src = changed(golden, tmp_path / "src", {sink: row}, use_sink=True)
    convert(src, tmp_path / "dst", code_version=golden.code_version)
    plain = tmp_path / "plain"
    convert(golden.path, plain, code_version=golden.code_version)
    with_sink, without = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "dst", plain))
    assert with_sink.config.use_sink
    tokens = golden.prompts[0][None]
    with torch.no_grad():
        embeds = torch.cat([row[None], without.get_input_embeddings()(tokens)], dim=1)
        expected = without(inputs_embeds=embeds).logits[:, 1:]
        torch.testing.assert_close(with_sink(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("golden", "changes", "sentence"),
    [
        (OUTER, {"sliding_window": True}, "`sliding_window` with variant 'v2'"),
        (OUTER, {"act_on": True}, "`act_on` is True"),
        (OUTER, {"attend_to_previous_input": True}, "`attend_to_previous_input` is True"),
        (OUTER, {"architectures": ["ThinkingARMTForCausalLM"]}, "of a ThinkingARMTForCausalLM"),
        (OUTER, {"architectures": ["InnerLoopARMTForCausalLM"], "auto_map": {"a": "b"}}, "one of the two is another"),
        (OLD, {}, "--code-version old"),
        (IL08, {}, "--code-version il08"),
        (IL08, {"freeze_base_model": False}, "of a MemoryParamsARMTForCausalLM"),
    ],
)
def test_what_is_not_computed_or_not_known_is_refused(
    golden: Golden, changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        convert(changed(golden, tmp_path / "src", **changes), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("text", "sentence"), [(DISJOINT, "disjoint_memory.py or a first"), (ONLINE, "online_armt.py")]
)
def test_the_python_file_beside_the_weights_is_believed(text: str, sentence: str, tmp_path: Path) -> None:
    """A checkpoint of online_armt has the research code's names and no config.json."""
    golden = IL08 if text == DISJOINT else Golden("armtv2_llama")
    src = tmp_path / "src"
    if text == DISJOINT:
        changed(golden, src)
    else:
        src.mkdir()
        shutil.copyfile(golden.checkpoint, src / "model.safetensors")
    (src / "modeling_armt.py").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        convert(src, tmp_path / "dst", golden.path / "base_config")


def test_heads_that_online_armt_would_have_are_to_be_confirmed(tmp_path: Path) -> None:
    """Their tensors alone are those of a memory of as many heads."""
    golden = Golden("armtv2_llama")
    tensors = load_file(golden.checkpoint)
    for name, tensor in list(tensors.items()):
        if name.endswith((".W_mb.weight", ".W_mb.bias")):
            tensors[name] = tensor.repeat_interleave(8, 0)
    save_file(tensors, tmp_path / "model.safetensors")
    given = {"segment_size": 16, "variant": "v2"}
    with pytest.raises(ValueError, match=r"has 8 heads, and of online_armt.*--n-heads 8"):
        convert(tmp_path, tmp_path / "dst", golden.path / "base_config", WrapperArgs(given))
    made = convert(tmp_path, tmp_path / "dst", golden.path / "base_config", WrapperArgs(given | {"n_heads": 8}))
    assert made.config.n_heads == 8


def test_a_config_json_of_the_base_model_beside_the_weights_is_taken_for_it(tmp_path: Path) -> None:
    golden = Golden("rmt_llama")
    shutil.copyfile(golden.checkpoint, tmp_path / "model.safetensors")
    shutil.copyfile(golden.path / "base_config" / "config.json", tmp_path / "config.json")
    convert(tmp_path, tmp_path / "dst", args=WrapperArgs({"segment_size": 16}))
    assert_computes(tmp_path / "dst", golden)


def test_a_base_model_that_the_config_already_holds_is_not_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="says what the base model is: leave --base-config out"):
        convert(OLD.path, tmp_path / "dst", OLD.path / "base_config", code_version="old")


def test_the_version_is_only_said_of_a_config_that_leaves_it_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--code-version is for a checkpoint with an ARMT's config\.json"):
        convert(ROOT / "rmt_llama", tmp_path / "dst", ROOT / "rmt_llama" / "base_config", code_version="il08")

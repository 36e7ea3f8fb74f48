"""A checkpoint of an older version of the authors' code is served from its own directory, by its own config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm.transformers_utils.config import get_config

from tests.support.engines import centred, decoded_log_probs, engine, generate, greedy
from tests.support.golden_cases import ROOT, Golden, relative_l2

RUN_20 = Golden("il08_llama_sw_sink_run20")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As published: the base model by its name, and the Python file beside it, which must not run."""
    monkeypatch.chdir(tmp_path)
    base = Path("meta-llama/Llama-3.2-1B")
    base.mkdir(parents=True)
    (base / "config.json").write_text((RUN_20.path / "base_config" / "config.json").read_text())
    folder = tmp_path / "run_20"
    folder.mkdir()
    auto_map = {"AutoConfig": "modeling_armt.ARMTConfig", "AutoModelForCausalLM": "modeling_armt.InnerLoopARMT"}
    written = json.loads((RUN_20.path / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"auto_map": auto_map, "base_model_name": str(base)}))
    (folder / "model.safetensors").write_bytes(RUN_20.checkpoint.read_bytes())
    (folder / "modeling_armt.py").write_text("raise SystemExit('this ran')\n")
    return folder


def test_the_published_window_is_served_as_it_is(directory: Path):
    i = RUN_20.generations[-1]
    expected = RUN_20.tensors[f"gen_logits.{i}"]
    with engine(directory, schedule="diagonal") as llm:
        (output,) = generate(llm, [RUN_20.prompts[i]], greedy(len(expected)))
    assert output.outputs[0].token_ids == RUN_20.tensors[f"gen_tokens.{i}"].tolist()
    assert relative_l2(centred(decoded_log_probs(output)), centred(expected)) <= RUN_20.tolerance(i)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_its_code_is_not_run(directory: Path, trust_remote_code: bool):
    assert get_config(directory, trust_remote_code=trust_remote_code).architectures == ["ARMTSlidingWindowForCausalLM"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("thinking_x1", "of a ThinkingARMTForCausalLM"), ("memparams_sw_sink", "of a MemoryParamsARMTForCausalLM")],
)
def test_what_is_not_supported_is_refused_by_name(name: str, sentence: str, tmp_path: Path):
    (tmp_path / "config.json").write_text((ROOT / "version_configs" / f"{name}.json").read_text())
    with pytest.raises(ValueError, match=sentence):
        get_config(tmp_path, trust_remote_code=False)

"""A stranger's checkpoint, tiny and whole, to damage: one of the research code, its base model, one of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import vllm_armt.hf  # noqa: F401  (registers the models)
from vllm_armt.checkpoints import Conversion, WrapperArgs, convert, init_from_base
from vllm_armt.config import ARMTConfig, RecurrentConfig
from vllm_armt.doctor.checkpoint import checkpoint

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 8,
}
ARGS = {"system": "armt_v2", "segment_size": 4, "d_mem": 2, "num_mem_tokens": 2, "n_heads": 1, "correction": True}

KEPT = ("base_model_config", "segment_size", "num_mem_tokens", "d_mem", "correction", "use_denom", "model_type")
OLDER: dict[str, Any] = {
    "act_on": False,
    "act_type": "associative",
    "architectures": ["InnerLoopARMTForCausalLM"],
    "attend_to_previous_input": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_armt.InnerLoopARMTForCausalLM"},
    "max_hop": 4,
    "sliding_window": False,
    "use_sink": False,
}
"""What an older version of the authors' code writes, and of which of today's keys it writes the same."""


@dataclass
class Stranger:
    """A folder with `base` (a base model), `ours` (an ARMT), `older` and `research` (as the authors' code wrote them).

    `dst` is where conversions go; `write` puts a file somewhere in the folder.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Stranger:
        torch.manual_seed(0)
        config = LlamaConfig(**SIZES, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
        init_from_base(str(folder / "base"), folder / "ours", segment_size=4, num_mem_tokens=2, d_mem=2)
        made = cls(folder)
        shutil.copytree(folder / "ours", folder / "older")
        ours = json.loads((folder / "ours" / "config.json").read_text())
        (folder / "older" / "config.json").write_text(json.dumps({key: ours[key] for key in KEPT} | OLDER))
        (folder / "research").mkdir()
        save_file(made.research_tensors(), folder / "research" / "model.safetensors")
        (folder / "research" / "args.json").write_text(json.dumps(ARGS))
        return made

    @property
    def dst(self) -> Path:
        return self.folder / "dst"

    def research_tensors(self) -> dict[str, Tensor]:
        """The ARMT's tensors, as the authors' wrapper spells them."""
        tensors = AutoModelForCausalLM.from_pretrained(self.folder / "ours").state_dict()
        return {f"memory_cell.{name}": tensor.clone() for name, tensor in tensors.items()}

    def convert(self, src: str = "research", **args: Any) -> Conversion:
        research = self.folder / "research"
        given = WrapperArgs.resolve(research / "args.json", **args)
        return convert(self.folder / src, self.dst, self.folder / "base", given)

    def convert_older(self) -> Conversion:
        return convert(self.folder / "older", self.dst)

    def init(self) -> RecurrentConfig:
        return init_from_base(str(self.folder / "base"), self.dst, segment_size=4, num_mem_tokens=2, d_mem=2)

    def doctor(self) -> None:
        """What the doctor says of `ours`: one sentence each."""
        found, _ = checkpoint(self.folder / "ours")
        assert not [finding for finding in found if "\n" in finding.said]

    def open_config(self) -> None:
        """What vLLM's hook reads of a config.json."""
        config = ARMTConfig.from_dict(json.loads((self.folder / "ours" / "config.json").read_text()))
        config.check()
        config.page_layout(1, 4, torch.float32)

    def refused(self, call: Callable[[], object], message: str) -> str:
        """Check that the call fails in one sentence with this in it, and leaves nothing; return the sentence."""
        before = sorted(self.folder.iterdir())
        try:
            call()
        except (ValueError, OSError) as error:
            said = str(error)
        else:
            raise AssertionError("it was taken")
        assert message in said, said
        assert "\n" not in said
        assert len(said) < 1500
        assert sorted(self.folder.iterdir()) == before
        return said

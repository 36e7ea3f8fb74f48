"""The goldens: checkpoints and what the authors' code computes from them (see goldens/README.txt)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_armt.config.versions import Confirmable

ROOT = Path(__file__).parents[1] / "goldens"


@dataclass(frozen=True)
class Golden:
    """One case: a checkpoint directory with the tensors that the authors' code gave for it."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @cached_property
    def args(self) -> dict:
        """Constructor arguments of the authors' wrapper."""
        return json.loads((self.path / "armt_args.json").read_text())

    @cached_property
    def report(self) -> dict:
        return json.loads((self.path / "golden.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "golden.safetensors")

    @property
    def is_hf(self) -> bool:
        """Whether the checkpoint was saved by the authors' newest code and needs no conversion."""
        return self.args["system"] in ("armt_hf", "armt_sw")

    @property
    def code_version(self) -> Confirmable | None:
        """Of an older version, what has to be said of it because its config.json leaves it open."""
        said: dict[str, Confirmable] = {"il08": "il08", "era": "il08", "old": "old"}
        return said.get(self.args["system"])

    @property
    def system(self) -> str:
        """Our `model_type` of it."""
        if self.args.get("sliding_window") and self.code_version == "il08":
            return "armt_sw"
        names = ("armt_hf", "armt_v2", "il08", "era", "old", "outer")
        return "armt" if self.args["system"] in names else self.args["system"]

    @property
    def backbone(self) -> str:
        """The base model's `model_type`."""
        return json.loads((self.path / "base_config" / "config.json").read_text())["model_type"]

    @property
    def checkpoint(self) -> Path:
        """The file with the weights."""
        return next(p for n in ("model.safetensors", "pytorch_model.bin") if (p := self.path / n).exists())

    def copy_checkpoint(self, target: Path) -> None:
        """Copy an HF-style case without golden.safetensors, which would be taken for weights."""
        target.mkdir()
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(self.path / name, target)

    @property
    def dtype(self) -> str:
        return self.args.get("dtype") or self.args.get("model_dtype") or "float32"

    @property
    def prompts(self) -> list[torch.Tensor]:
        count = sum(key.startswith("prompt.") for key in self.tensors)
        return [self.tensors[f"prompt.{i}"].long() for i in range(count)]

    def logits(self, i: int, setting: str = "") -> torch.Tensor:
        """[T, V] logits of every token of prompt i; `setting` as in `having`."""
        return self.tensors[f"{setting}logits.{i}"].float()

    def having(self, prefix: str) -> list[int]:
        """Prompts of which there is something of this name.

        Args:
            prefix: "gen_tokens", "final", "right.logits" and so on. Logits exist under the settings "right.",
                "center." (segment alignments), "sliding." (the previous segment's keys are seen) and
                "noalias." (the recurrence that a PRMT was meant to have).
        """
        indices = {key.removeprefix(f"{prefix}.").split(".")[0] for key in self.tensors if key.startswith(f"{prefix}.")}
        return sorted(int(i) for i in indices if i.isdigit())

    @property
    def generations(self) -> list[int]:
        """Prompts with decoded tokens."""
        return self.having("gen_tokens")

    def tolerance(self, i: int) -> float:
        """Relative L2 error allowed for prompt i: 1e-4, or 20 times the authors' own float32 noise."""
        return max(1e-4, 20 * self.report["forward"][i].get("fp32_vs_fp64_rel_l2", 0.0))


HF = [
    Golden(n)
    for n in (
        "armt_hf_llama",
        "armt_hf_llama_untied",
        "armt_hf_llama_nodenom",
        "armt_hf_gpt2",
        "armt_hf_gpt_neox",
        "armt_sw_llama",
    )
]
RESEARCH = [
    Golden(n)
    for n in (
        "armt_llama_gqa_tied",
        "armt_llama_untied",
        "armt_llama_nocorrection",
        "armt_llama_lora",
        "armt_llama_bf16",
        "armt_qwen2",
        "armt_qwen3",
        "armtv2_llama",
        "armt_gpt2_wrap",
        "armt_neox",
        "armtv2_gpt2_nowrap",
        "prmt_gpt2_wrap",
        "rmt_gpt2_wrap",
        "rmt_llama",
    )
]
OLDER = [
    Golden(n)
    for n in ("il08_llama_plain", "il08_llama_sink", "il08_llama_sw_sink_run20", "old_llama_plain_fa2", "outer_llama")
]
"""Of older versions of the authors' code, with their config.json."""
ALL = HF + RESEARCH + OLDER
SETTINGS: dict[str, dict[str, Any]] = {
    "right.": {"segment_alignment": "right"},
    "center.": {"segment_alignment": "center"},
    "sliding.": {"sliding_window": True},
    "noalias.": {"aliased": False},
}
"""Fields of the configuration under which a golden has further logits."""


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())

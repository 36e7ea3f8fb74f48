"""Adapters that were not merged yet are merged, whatever the system and the layout of the base's weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tests.support.research_checkpoint import Case

QUERIES = "memory_cell.layers.0.layer.self_attn.q_proj."


def adapt(case: Case, layer: str, shape: tuple[int, int]) -> Tensor:
    """Put an adapter of rank 2 and alpha 6 around a layer of `shape` (out, in); returns 3 B A."""
    A, B = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
    case.tensors[f"{layer}.base_layer.weight"] = case.tensors.pop(f"{layer}.weight")
    if f"{layer}.bias" in case.tensors:
        case.tensors[f"{layer}.base_layer.bias"] = case.tensors.pop(f"{layer}.bias")
    case.tensors |= {f"{layer}.lora_A.default.weight": A, f"{layer}.lora_B.default.weight": B}
    case.args["lora"] = {"r": 2, "lora_alpha": 6}
    return 3 * B @ A


def with_peft_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("memory_cell.model.", "memory_cell.model.base_model.model."): t for key, t in tensors.items()}


def test_adapters_are_merged_with_their_scale(lora: Case) -> None:
    lora.convert()
    layer = "memory_cell.layers.1.layer.self_attn.v_proj."
    A, B = (lora.tensors[f"{layer}lora_{part}.default.weight"] for part in "AB")
    W = lora.tensors[layer + "base_layer.weight"] + 32 / 8 * (B @ A)
    assert torch.allclose(lora.result()["model.model.layers.1.layer.self_attn.v_proj.weight"], W, atol=1e-6)
    assert not any("lora" in name or "base_layer" in name for name in lora.result())


def test_an_rmt_has_them_too(rmt: Case) -> None:
    layer = "memory_cell.model.model.layers.1.self_attn.k_proj"
    base = rmt.tensors[f"{layer}.weight"]
    update = adapt(rmt, layer, (32, 64))
    rmt.tensors = with_peft_prefix(rmt.tensors)
    rmt.convert()
    assert torch.allclose(rmt.result()["model.model.layers.1.self_attn.k_proj.weight"], base + update, atol=1e-5)


def test_weights_that_are_stored_in_by_out(prmt: Case) -> None:
    fused, square = (f"memory_cell.layers.0.layer.attn.{name}" for name in ("c_attn", "c_proj"))
    bases = {layer: prmt.tensors[f"{layer}.weight"] for layer in (fused, square)}
    updates = {fused: adapt(prmt, fused, (192, 64)), square: adapt(prmt, square, (64, 64))}
    prmt.tensors = with_peft_prefix(prmt.tensors)
    prmt.convert()
    for layer, base in bases.items():
        merged = prmt.result()[layer.replace("memory_cell.layers", "model.transformer.h") + ".weight"]
        assert torch.allclose(merged, base + updates[layer].mT, atol=1e-5)


def test_the_bias_of_an_adapted_layer_is_kept(lora: Case, tmp_path: Path) -> None:
    config = json.loads((lora.golden.path / "base_config" / "config.json").read_text()) | {"attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lora.base_config = tmp_path
    for key in [key for key in lora.tensors if key.endswith("_proj.weight") or key.endswith("base_layer.weight")]:
        if "self_attn" in key:
            lora.tensors[key.removesuffix("weight") + "bias"] = torch.randn(len(lora.tensors[key]))
    lora.convert()
    source = lora.tensors[QUERIES + "base_layer.bias"]
    assert torch.equal(lora.result()["model.model.layers.0.layer.self_attn.q_proj.bias"], source)


class TestRefused:
    def test_an_unknown_scale(self, lora: Case) -> None:
        lora.args["lora"] = None
        lora.refused("--lora-alpha")

    def test_half_an_adapter(self, lora: Case) -> None:
        del lora.tensors[QUERIES + "lora_B.default.weight"]
        lora.refused("Missing tensor 'model.model.layers.0.layer.self_attn.q_proj.lora_B.default.weight'")

    def test_an_adapter_that_does_not_fit(self, lora: Case) -> None:
        name = QUERIES + "lora_A.default.weight"
        lora.tensors[name] = lora.tensors[name][:4]
        lora.refused("does not fit")

    def test_other_parts_of_an_adapter(self, lora: Case) -> None:
        lora.tensors[QUERIES + "lora_magnitude_vector.default.weight"] = torch.ones(64)
        lora.refused("Unexpected tensor 'model.model.layers.0.layer.self_attn.q_proj.lora_magnitude_vector")

"""Merging the LoRA adapters that a checkpoint still carries beside its base weights (PEFT's names)."""

from __future__ import annotations

from torch import Tensor

from vllm_armt.config import Refused


def merge_lora(tensors: dict[str, Tensor], alpha: float | None, *, in_out: bool = False) -> dict[str, Tensor]:
    """Replace every adapted layer's `base_layer`, `lora_A` and `lora_B` by W = base + alpha/r B A.

    The sum is taken in float32 and kept in the base's dtype; r is A's first dimension.

    Args:
        tensors: by our names.
        alpha: PEFT's `lora_alpha`, which no file carries; None if unknown.
        in_out: the base model's weights are `[in, out]` (GPT-2's Conv1D), the transpose of everyone else's.

    Raises:
        Refused: there are adapters but no alpha, or an adapter is incomplete or ill-shaped.
    """
    merged = dict(tensors)
    for name in [name for name in tensors if name.endswith(".base_layer.weight")]:
        if alpha is None:
            raise Refused(
                f"The checkpoint has unmerged LoRA adapters (as of {name!r}), and their scale is not in it. "
                "Give the value of `lora_alpha` from training: --lora-alpha, or `lora` in --wrapper-args."
            )
        layer = name.removesuffix(".base_layer.weight")
        base = merged.pop(name)
        A, B = (_adapter(merged, f"{layer}.lora_{part}.default.weight") for part in "AB")
        W = base.mT if in_out and base.ndim == 2 else base
        if any(part.ndim != 2 or not part.numel() for part in (W, A, B)) or (B.shape[0], A.shape[1], B.shape[1]) != (
            *W.shape,
            A.shape[0],
        ):
            raise Refused(
                f"The LoRA adapter of {layer!r} does not fit: base {list(base.shape)}, A {list(A.shape)}, "
                f"B {list(B.shape)}; expected A [r, in] and B [out, r]."
            )
        W = (W.float() + alpha / len(A) * (B.float() @ A.float())).to(base.dtype)
        merged[f"{layer}.weight"] = (W.mT if in_out else W).contiguous()
        if f"{layer}.base_layer.bias" in merged:
            merged[f"{layer}.bias"] = merged.pop(f"{layer}.base_layer.bias")
    return merged


def _adapter(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise Refused(f"Missing tensor {name!r}: the layer has a LoRA adapter without it.")
    return tensors.pop(name)

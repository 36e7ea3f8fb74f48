"""`vllm-armt init`: a fresh ARMT around a base model, to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def init(
    base: Annotated[str, typer.Argument(help="Directory of the base model, or its name on the Hugging Face hub.")],
    dst: Annotated[Path, typer.Argument(help="New directory.")],
    segment_size: Annotated[int, typer.Option(help="S, tokens of a segment, without memory tokens.")],
    num_mem_tokens: Annotated[int, typer.Option(help="m, memory tokens appended to each segment.")],
    d_mem: Annotated[int, typer.Option(help="Width of the memory's queries and keys; the memory has 6 d_mem rows.")],
    variant: Annotated[
        Literal["v1", "v2"], typer.Option(help="v2 normalises the feature map, as the newest code does.")
    ] = "v2",
    state_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="In what the server keeps M and z between steps.")
    ] = "float32",
    memory_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Dtype of the memory's own weights. [default: the base model's]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="For the memory's own weights.")] = 0,
) -> None:
    """Put a fresh memory around a base model.

    Until it is trained it computes what the base model does within a segment, and forgets the rest.
    """
    from vllm_armt.checkpoints import init_from_base

    config = init_from_base(
        base,
        dst,
        segment_size=segment_size,
        num_mem_tokens=num_mem_tokens,
        d_mem=d_mem,
        seed=seed,
        variant=variant,
        state_dtype=state_dtype,
        memory_dtype=memory_dtype,
    )
    layers = config.base_model_config.num_hidden_layers
    print(
        f"{dst}: {config.base_model_config.model_type}, {layers} layers, {config.model_dtype}\n"
        f"  segment_size {segment_size}, num_mem_tokens {num_mem_tokens}, d_mem {d_mem}, variant {variant}\n"
        f"Next: train it with transformers (import vllm_armt.hf), or vllm serve {dst}"
    )

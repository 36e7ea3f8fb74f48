"""`vllm-armt convert`: a research checkpoint of the authors' in, a directory to serve out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from vllm_armt.checkpoints import Conversion


def convert(
    src: Annotated[Path, typer.Argument(help="Weights file, index of shards, or directory of the research code.")],
    dst: Annotated[Path, typer.Argument(help="New directory.")],
    base_config: Annotated[Path, typer.Option(help="Directory of the base model, or its config.json.")],
    wrapper_args: Annotated[
        Path | None, typer.Option(help="JSON of the arguments that the authors' wrapper was constructed with.")
    ] = None,
    segment_size: Annotated[
        int | None, typer.Option(help="S as given to the wrapper: real tokens, without memory tokens.")
    ] = None,
    variant: Annotated[
        Literal["v1", "v2"] | None,
        typer.Option(help="v1: the 2024 releases; v2: code that normalises the feature map."),
    ] = None,
    correction: Annotated[
        bool | None, typer.Option(help="Whether the write to z is corrected by gamma. [default: the authors', yes]")
    ] = None,
    use_denom: Annotated[
        bool | None, typer.Option(help="Whether reads are divided by q.z. [default: the authors', yes]")
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of LoRA adapters that are not merged yet.")] = None,
    generation_policy: Annotated[
        Literal["open", "commit"],
        typer.Option(help="When generation fills a segment: never write it (the papers), or write it and go on."),
    ] = "open",
    state_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="In what the server keeps M and z between steps.")
    ] = "float32",
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Directory to copy the tokenizer from. [default: beside SRC, else --base-config]"),
    ] = None,
) -> None:
    """Convert a checkpoint of the authors' research code into a directory that vLLM serves.

    The checkpoint carries neither S nor which mathematics it was trained with: give them with
    --wrapper-args, or as options, which win over the file.
    """
    from vllm_armt import checkpoints

    args = checkpoints.WrapperArgs.resolve(
        wrapper_args,
        segment_size=segment_size,
        variant=variant,
        correction=correction,
        use_denom=use_denom,
        lora_alpha=lora_alpha,
    )
    conversion = checkpoints.convert(
        src, dst, base_config, args, tokenizer=tokenizer, generation_policy=generation_policy, state_dtype=state_dtype
    )
    print(_summary(conversion, dst))


def _summary(conversion: Conversion, dst: Path) -> str:
    config = conversion.config
    base = config.base_model_config
    assumed = ", ".join(f"{name}={value}" for name, value in conversion.assumed.items())
    lines = [
        f"{dst}: {base.model_type}, {base.num_hidden_layers} layers, {config.model_dtype}",
        f"  segment_size {config.segment_size}, num_mem_tokens {config.num_mem_tokens}, d_mem {config.d_mem}",
        f"  variant {config.variant}, correction {config.correction}, use_denom {config.use_denom}, "
        f"generation_policy {config.generation_policy}",
        f"  assumed, as the authors' constructor does: {assumed or 'nothing'}",
        f"  tokenizer: {conversion.tokenizer or 'none found; give --tokenizer DIR, or serve without one'}",
        f"Next: vllm serve {dst}",
    ]
    return "\n".join(lines)

"""`vllm-armt convert`: a checkpoint of the authors' in, a directory to serve out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vllm_armt.cli.summary import TOKEN_IDS, serving, summary

if TYPE_CHECKING:
    from vllm_armt.checkpoints import Conversion


def convert(
    src: Annotated[
        str,
        typer.Argument(
            help="Weights file, index of shards, or directory of the authors' code; or OWNER/NAME or OWNER/NAME/FILE "
            "of the Hugging Face hub."
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="New directory.")],
    base_config: Annotated[
        str | None,
        typer.Option(
            help="Directory of the base model, its config.json, or its name on the hub. [default: as the checkpoint's "
            "config.json says]"
        ),
    ] = None,
    code_version: Annotated[
        Literal["il08", "old"] | None,
        typer.Option(
            help="Which version of the authors' code wrote config.json, where it leaves that open. il08: "
            "modeling_amt/inner_loop.py; old: inner_loop_old.py, trained with flash attention. [default: as the files "
            "tell]"
        ),
    ] = None,
    wrapper_args: Annotated[
        Path | None, typer.Option(help="JSON of the arguments that the authors' wrapper was constructed with.")
    ] = None,
    system: Annotated[
        Literal["armt", "prmt", "rmt"] | None,
        typer.Option(help="To be checked against the tensors, which tell it. [default: as they tell]"),
    ] = None,
    segment_size: Annotated[
        int | None, typer.Option(help="S as given to the wrapper: real tokens, without memory tokens.")
    ] = None,
    variant: Annotated[
        Literal["v1", "v2"] | None,
        typer.Option(help="ARMT. v1: the 2024 releases; v2: code that normalises the feature map."),
    ] = None,
    correction: Annotated[
        bool | None,
        typer.Option(help="ARMT: whether the write to z is corrected by gamma. [default: the authors', yes]"),
    ] = None,
    use_denom: Annotated[
        bool | None, typer.Option(help="ARMT: whether reads are divided by q.z. [default: the authors', yes]")
    ] = None,
    n_heads: Annotated[
        int | None,
        typer.Option(help="ARMT: heads of the memory. Required with gating; else the tensors tell it."),
    ] = None,
    aliased: Annotated[
        bool | None,
        typer.Option(
            help="PRMT: whether a layer finds the memory of the layer above, as the released code has it, or its own. "
            "[default: the released code's, yes]"
        ),
    ] = None,
    segment_alignment: Annotated[
        Literal["left", "right", "center"] | None,
        typer.Option(help="Where the segments of a prompt lie. [default: the authors', left]"),
    ] = None,
    sliding_window: Annotated[
        bool | None,
        typer.Option(help="GPT-2 with wrap_pos: every segment sees the keys of the one before. [default: no]"),
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale of LoRA adapters that are not merged yet.")] = None,
    generation_policy: Annotated[
        Literal["open", "commit"] | None,
        typer.Option(
            help="When generation fills a segment: never write it (the papers), or write it and go on. [default: open]"
        ),
    ] = None,
    state_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            help="In what the server keeps what segments leave. [default: float32 for ARMT, else the served model's]"
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Directory to copy the tokenizer from. [default: beside SRC, else --base-config]"),
    ] = None,
) -> None:
    """Convert a checkpoint of the authors' code into a directory that vLLM serves.

    A checkpoint of the research code (ARMT, PRMT or RMT) often carries neither S nor which mathematics it was trained
    with: give them with --wrapper-args, or as options, which win over any file. A checkpoint with a config.json of an
    older version needs none: its config.json is rewritten. What stands beside the weights is used.
    """
    from vllm_armt import checkpoints

    args = checkpoints.WrapperArgs.resolve(
        wrapper_args,
        system=system,
        segment_size=segment_size,
        variant=variant,
        correction=correction,
        use_denom=use_denom,
        n_heads=n_heads,
        aliased=aliased,
        segment_alignment=segment_alignment,
        sliding_window=sliding_window,
        lora_alpha=lora_alpha,
    )
    options = {"generation_policy": generation_policy, "state_dtype": state_dtype}
    given = {name: value for name, value in options.items() if value is not None}
    made = checkpoints.convert(src, dst, base_config, args, tokenizer=tokenizer, code_version=code_version, **given)
    print(_summary(made, dst))


def _summary(conversion: Conversion, dst: Path) -> str:
    assumed = ", ".join(f"{name}={value}" for name, value in conversion.assumed.items())
    left_out, *more = conversion.left_out or ["nothing"]
    lines = [
        *summary(conversion.config, dst),
        f"  assumed, as the authors' code does: {assumed or 'nothing'}",
        f"  left out, because it has no effect: {left_out}" + (f" and {len(more)} more" if more else ""),
        f"  tokenizer: {conversion.tokenizer or f'none found; give --tokenizer DIR, or {TOKEN_IDS}'}",
        f"Next: {serving(dst)}",
    ]
    return "\n".join(lines)

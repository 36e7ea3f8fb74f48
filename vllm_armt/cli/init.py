"""`vllm-armt init`: a fresh model of any system around a base model, to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_armt.cli.summary import TOKEN_IDS, serving, summary


def init(
    base: Annotated[str, typer.Argument(help="Directory of the base model, or its name on the Hugging Face hub.")],
    dst: Annotated[Path, typer.Argument(help="New directory.")],
    segment_size: Annotated[int, typer.Option(help="S, tokens of a segment, without memory tokens.")],
    num_mem_tokens: Annotated[int, typer.Option(help="m, memory tokens of a segment.")],
    system: Annotated[
        Literal["armt", "armt_sw", "prmt", "rmt"],
        typer.Option(
            help="armt: an associative memory in every layer; armt_sw: that and attention into the segment before; "
            "prmt: memory tokens of every layer's own; rmt: memory tokens through the top layer."
        ),
    ] = "armt",
    d_mem: Annotated[
        int | None,
        typer.Option(help="ARMT, required: width of the memory's queries and keys; the memory has 6 d_mem rows."),
    ] = None,
    n_heads: Annotated[int | None, typer.Option(help="ARMT: heads of the memory. [default: 1]")] = None,
    gating: Annotated[
        bool | None, typer.Option(help="ARMT: beta per channel instead of per memory token. [default: no]")
    ] = None,
    variant: Annotated[
        Literal["v1", "v2"] | None,
        typer.Option(help="ARMT: v2 normalises the feature map, as the newest code does. [default: v2]"),
    ] = None,
    use_sink: Annotated[
        bool | None, typer.Option(help="ARMT: a learned row before every segment. [default: no]")
    ] = None,
    aliased: Annotated[
        bool | None,
        typer.Option(
            help="PRMT: a layer finds the memory of the layer above, as the released code has it, instead of its own. "
            "[default: yes]"
        ),
    ] = None,
    wrap_pos: Annotated[
        bool | None, typer.Option(help="GPT-2: memory tokens have learned positions of their own. [default: no]")
    ] = None,
    learned_positions: Annotated[
        Literal["restart", "grow"],
        typer.Option(help="GPT-2: positions begin anew in every segment, or grow until there are no more."),
    ] = "restart",
    generation_policy: Annotated[
        Literal["commit", "open"] | None,
        typer.Option(
            help="When generation fills a segment: write it and go on, or never write it. "
            "[default: commit for ARMT, open for the others]"
        ),
    ] = None,
    state_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            help="In what the server keeps what segments leave. [default: float32 for ARMT, else the served model's]"
        ),
    ] = None,
    memory_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Dtype of the memory's own weights. [default: the base model's]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="For the memory's own weights.")] = 0,
) -> None:
    """Put a fresh memory around a base model.

    Until it is trained, an ARMT computes what the base model does within a segment, and forgets the rest. What
    stands before a segment's tokens (the memory of an RMT or a PRMT, a sink) disturbs the base model until then.
    """
    from vllm_armt.checkpoints import init_from_base
    from vllm_armt.checkpoints.directory import has_tokenizer

    options = {
        "d_mem": d_mem,
        "n_heads": n_heads,
        "gating": gating,
        "variant": variant,
        "use_sink": use_sink,
        "aliased": aliased,
        "wrap_pos": wrap_pos,
        "learned_positions": learned_positions,
        "generation_policy": generation_policy,
        "state_dtype": state_dtype,
        "memory_dtype": memory_dtype,
    }
    config = init_from_base(
        base,
        dst,
        system=system,
        segment_size=segment_size,
        num_mem_tokens=num_mem_tokens,
        seed=seed,
        **{name: value for name, value in options.items() if value is not None},
    )
    print("\n".join(summary(config, dst)))
    if not has_tokenizer(dst):
        print(f"  tokenizer: {base} has none; copy its files into {dst}, or {TOKEN_IDS}")
    print(f"Next: train it with transformers (import vllm_armt.hf), or serve it: {serving(dst)}")

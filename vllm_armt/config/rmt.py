"""Configurations of the systems whose memory travels in the token stream: RMT, and PRMT with a memory per layer."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_armt.config.base import RecurrentConfig


class RMTConfig(RecurrentConfig):
    """Configuration of a recurrent memory transformer: `[memory, tokens, memory]`, carried by the top layer.

    The papers' released code never closes a prompt's last segment, hence the default of `generation_policy`.
    """

    model_type = "rmt"
    architecture = "RMTForCausalLM"

    generation_policy: str = "open"

    @property
    def prefix_rows(self) -> int:
        return self.num_mem_tokens

    @property
    def state(self) -> dict[str, tuple[int, ...]]:
        return {"memory": (self.num_mem_tokens, self.base_model_config.hidden_size)}


class PRMTConfig(RMTConfig):
    """Configuration of a parallel RMT: every layer carries a memory of its own.

    Args:
        aliased: whether a layer's memory is what the layer above had in the segment before, the top one's
            its own output: what the released code computes, whose views alias, and its checkpoints are
            trained with. False is the intended recurrence: every layer's memory is its own output.
        others: see `RecurrentConfig`.
    """

    model_type = "prmt"
    architecture = "PRMTForCausalLM"

    aliased: bool = True

    def _inconsistencies(self) -> Iterator[str]:
        yield from super()._inconsistencies()
        if self.sliding_window:
            yield "`sliding_window` is true; a PRMT has none. Set it to false."

"""What a request behind a memory is counted for: the tokens that were sent, not those put in front of them."""

from __future__ import annotations

from vllm.v1.metrics.stats import PrefillStats


class SentTokens(PrefillStats):
    """vLLM's counts of a prompt's tokens without the first `hidden` ones, which cost nothing to read.

    Args:
        hidden: tokens that the prompt has more than was sent.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self._hidden = hidden

    def set(self, num_prompt_tokens: int, num_local_cached_tokens: int, num_external_cached_tokens: int) -> None:
        cached = max(num_local_cached_tokens + num_external_cached_tokens - self._hidden, 0)
        local = min(num_local_cached_tokens, cached)
        super().set(num_prompt_tokens - self._hidden, local, cached - local)

    def finalize(self, num_cached_tokens: int) -> None:
        super().finalize(max(num_cached_tokens - self._hidden, 0))

"""Requests on an engine, driven step by step, with the time at which each token came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_armt.cli.bench.engines import Engine

CHECKED_TOKENS = list(range(16))
"""Tokens whose log-probabilities are compared where two sides must agree."""

TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.15}
"""Difference in a log-probability that rounding explains; logits of random weights have deviation 1."""

_ids = count()


@dataclass
class Request:
    """One request and what came of it.

    Attributes:
        prompt_tokens: its length.
        submitted: when, in seconds of `time.perf_counter`.
        times: when each new token came.
        cached: prompt tokens that the prefix cache had.
        log_probs: of `CHECKED_TOKENS` after the prompt, if they were asked for.
    """

    prompt_tokens: int
    submitted: float
    times: list[float] = field(default_factory=list)
    cached: int = 0
    log_probs: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.submitted


@dataclass(frozen=True)
class Step:
    """One engine step, from `begin` to `end`, and the requests that got a token from it."""

    begin: float
    end: float
    emitted: list[Request]

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Session:
    """Requests that share an engine; `probe` is called after each step, outside of its time."""

    def __init__(self, engine: Engine, probe: Callable[[], None] | None = None) -> None:
        self.steps: list[Step] = []
        self.requests: dict[str, Request] = {}
        self._take_turn = engine.take_turn
        self._engine = engine.llm.llm_engine
        self._probe = probe

    def submit(self, prompt: list[int], max_tokens: int, check: bool = False, memory: str | None = None) -> Request:
        """Add a request that decodes exactly `max_tokens` tokens, with log-probabilities if `check`.

        Args:
            memory: name or id of the memory that it goes on from.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprob_token_ids=CHECKED_TOKENS if check else None,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if memory is None else {"memory": memory},
        )
        name = str(next(_ids))
        request = self.requests[name] = Request(len(prompt), time.perf_counter())
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return request

    def step(self) -> Step:
        """Run one step of the engine.

        Raises:
            RuntimeError: a request ended with an error.
        """
        self._take_turn()
        begin = time.perf_counter()
        outputs: list[Any] = self._engine.step()
        end = time.perf_counter()
        emitted = []
        for output in outputs:
            request, (completion,) = self.requests[output.request_id], output.outputs
            if completion.finish_reason == "error":
                raise RuntimeError(f"A request of {request.prompt_tokens} tokens ended: {completion.stop_reason}")
            if not completion.token_ids:
                continue
            if not request.times:
                request.cached = output.num_cached_tokens or 0
                if completion.logprobs:
                    first = completion.logprobs[0]
                    request.log_probs = [first[token].logprob for token in CHECKED_TOKENS]
            request.times += [end] * len(completion.token_ids)
            emitted.append(request)
        step = Step(begin, end, emitted)
        self.steps.append(step)
        if self._probe:
            self._probe()
        return step

    def finish(self) -> None:
        """Step until no request is left."""
        while self._engine.has_unfinished_requests():
            self.step()

    def until_read(self, requests: Sequence[Request]) -> None:
        """Step until each of `requests` has its first token."""
        while not all(request.times for request in requests):
            self.step()

    def abort(self) -> None:
        """End all requests and let the engine forget them."""
        self._engine.abort_request(list(self.requests))
        self.finish()


def disagreement(answers: Sequence[Sequence[float]], dtype: str) -> float | None:
    """By how much log-probabilities that should be the same differ at most, if rounding does not explain it."""
    first, *others = answers
    difference = max((abs(a - b) for other in others for a, b in zip(first, other, strict=True)), default=0.0)
    return difference if difference > TOLERANCE[dtype] or difference != difference else None

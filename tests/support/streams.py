"""Streamed input in an in-process engine: what `AsyncLLM.generate` does with a stream, without its process."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.support.engines import log_probs

STOP = 7
"""The token that ends a turn."""


@dataclass(frozen=True)
class Turn:
    """A piece of the prompt, and how many tokens are generated behind it; the last is `STOP` if the turn `stops`."""

    prompt: list[int]
    new: int
    stops: bool = True

    @property
    def params(self) -> SamplingParams:
        """Greedy; a turn that stops does so before vLLM can know it, one that doesn't when its tokens are counted."""
        return SamplingParams(
            temperature=0,
            max_tokens=self.new + 3 if self.stops else self.new,
            min_tokens=self.new - 1 if self.stops else 0,
            stop_token_ids=[STOP] if self.stops else None,
            logit_bias={STOP: 100} if self.stops else None,
            ignore_eos=True,
            detokenize=False,
            logprobs=-1,
            output_kind=RequestOutputKind.DELTA,
        )


@dataclass
class Answer:
    """What a turn generated: tokens, and the log-probabilities `[n, V]` that each was chosen from."""

    tokens: list[int]
    log_probs: Tensor


def stream(llm: LLM, turns: list[Turn], waits: bool) -> list[Answer]:
    """Send turns as one request.

    Args:
        llm: the engine.
        turns: of the request.
        waits: whether a turn is sent once the one before is over, else all are at the start.
    """
    engine = llm.llm_engine
    requests = [
        engine.input_processor.process_inputs(
            "streamed",
            {"prompt_token_ids": list(prompt)},
            turn.params,
            supported_tasks=engine.get_supported_tasks(),
            resumable=not is_end,
        )
        # the end is a request of one token, which is not read
        for turn, prompt, is_end in [*((turn, turn.prompt, False) for turn in turns), (turns[-1], [0], True)]
    ]
    engine.input_processor.assign_request_id(requests[0])
    for request in requests[1:]:
        request.request_id, request.external_req_id = requests[0].request_id, requests[0].external_req_id

    def send(number: int) -> None:
        for request in requests[:number]:
            engine.output_processor.add_request(request, None, None, 0)
            # a process of its own would get a copy: both sides extend the prompt
            engine.engine_core.add_request(copy.deepcopy(request))
        del requests[:number]

    send(1 if waits else len(requests))
    answers: list[Answer] = []
    tokens: list[int] = []
    positions: list = []
    while len(answers) < len(turns):
        for output in engine.step():
            (delta,) = output.outputs
            tokens += delta.token_ids
            positions += delta.logprobs or []
            if delta.finish_reason is not None:
                answers.append(Answer(tokens, log_probs(positions)))
                tokens, positions = [], []
                send(1)
    send(len(requests))
    while engine.has_unfinished_requests():
        engine.step()
    return answers

"""A scheduler of vLLM's without a model; a simulated worker checks what every step reads and writes."""

from __future__ import annotations

import copy
import json
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, make_block_hash_with_group_id
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.simulated_worker import Worker
from vllm_armt.config import ARMTConfig
from vllm_armt.core import Segmentation
from vllm_armt.integration.cache import SegmentSpec
from vllm_armt.integration.scheduler import SegmentScheduler, prefill_end

MAX_MODEL_LEN = 1 << 21
BOOK = bytes(i * i % 199 for i in range(4000))
OTHER = bytes(i * 7 % 193 for i in range(4000))
"""Two texts."""
STOP = b"\xff"
"""What ends a turn of streamed input."""
init_none_hash(sha256)


@cache
def _vllm_config() -> VllmConfig:
    """A config around a one-layer model that is never loaded; building it takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 256,
            "max_position_embeddings": MAX_MODEL_LEN,
        }
        Path(folder, "config.json").write_text(json.dumps(config))
        return VllmConfig(
            model_config=ModelConfig(model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="float32"),
            cache_config=CacheConfig(block_size=16),
            scheduler_config=SchedulerConfig(
                max_num_seqs=4, max_num_batched_tokens=64, max_model_len=MAX_MODEL_LEN, is_encoder_decoder=False
            ),
        )


def vllm_config(
    *,
    slots: int,
    budget: int,
    segment_size: int = 16,
    is_async: bool = False,
    policy: str = "fcfs",
    generation_policy: str = "commit",
    segment_alignment: str = "left",
    max_open_tokens: int = MAX_MODEL_LEN,
    max_model_len: int = MAX_MODEL_LEN,
) -> VllmConfig:
    config = copy.copy(_vllm_config())
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.block_size = segment_size
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_seqs = slots
    config.scheduler_config.max_num_batched_tokens = budget
    config.scheduler_config.max_num_scheduled_tokens = None
    config.scheduler_config.max_model_len = max_model_len
    config.scheduler_config.async_scheduling = is_async
    config.scheduler_config.policy = policy
    config.model_config = copy.copy(config.model_config)
    config.model_config.max_model_len = max_model_len
    config.model_config.hf_config = ARMTConfig(
        base_model_config={"model_type": "llama", "max_position_embeddings": max_open_tokens},
        segment_size=segment_size,
        num_mem_tokens=1,
        d_mem=1,
        generation_policy=generation_policy,
        segment_alignment=segment_alignment,
    )
    return config


def make_scheduler(config: VllmConfig, pages: int, *, prefix_caching: bool = True) -> SegmentScheduler:
    """A scheduler over `pages` usable pages."""
    segment_size = config.cache_config.block_size
    config.cache_config.enable_prefix_caching = prefix_caching
    config.cache_config.num_gpu_blocks = pages + 1
    return SegmentScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=pages + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], SegmentSpec.create(segment_size, 256))],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=segment_size,
        log_stats=True,
    )


def continued(text: bytes, n: int) -> bytes:
    """A text and the `n` tokens that any document generates behind it."""
    return text + bytes(200 + i % 7 for i in range(len(text), len(text) + n))


def ended(text: bytes, stops: bool) -> bytes:
    """A text whose last token is `STOP` if it `stops`."""
    return text[:-1] + STOP if stops else text


@dataclass
class Document:
    """A request's life: its prompt, what it generates, and when it comes and, maybe, is aborted."""

    name: str
    prompt: bytes
    max_tokens: int = 1
    arrival: int = 0
    abort: int | None = None
    priority: int = 0
    prompt_logprobs: bool = False
    streams_input: bool = False
    stops: bool = False
    """Whether its last token is `STOP`, before as many as it asks for."""

    @property
    def texts(self) -> list[bytes]:
        """Prompt and generation; what is generated at a position is the same for all."""
        return [ended(continued(self.prompt, self.max_tokens), self.stops)]

    @property
    def text(self) -> bytes:
        """The whole text."""
        return self.texts[-1]

    @property
    def generated(self) -> bytes:
        """All tokens that are asked for."""
        return self.text[len(self.prompt) :]

    @property
    def last_arrival(self) -> int:
        """From when on nothing comes any more."""
        return self.arrival

    def arriving(self, step: int, segment_size: int, prefix_caching: bool) -> Iterator[Request]:
        """What comes before a step."""
        if step == self.arrival:
            yield self.request(segment_size, prefix_caching)

    def request(self, segment_size: int, prefix_caching: bool) -> Request:
        return Request(
            request_id=self.name,
            prompt_token_ids=list(self.prompt),
            sampling_params=SamplingParams(
                max_tokens=self.max_tokens + 2 * segment_size * self.stops,
                ignore_eos=True,
                stop_token_ids=list(STOP),
                prompt_logprobs=1 if self.prompt_logprobs else None,
            ),
            pooling_params=None,
            arrival_time=float(self.arrival),
            priority=self.priority,
            block_hasher=get_request_block_hasher(segment_size, sha256) if prefix_caching else None,
            resumable=self.streams_input,
        )


@dataclass(frozen=True)
class Turn:
    """A piece of streamed input, the tokens that are generated behind it, and when it comes.

    The last of the tokens is `STOP` if the turn `stops`, before as many as are asked for.
    """

    prompt: bytes
    max_tokens: int
    arrival: int
    stops: bool


@dataclass
class Stream(Document):
    """A document whose prompt comes in turns; each goes on behind the last token but one of the turn before."""

    turns: list[Turn] = field(default_factory=list)
    end: int = 0
    """When it is known that there is no further turn."""

    @property
    def texts(self) -> list[bytes]:
        """The text at the end of each turn."""
        texts = [b"\0"]
        for turn in self.turns:
            texts.append(ended(continued(texts[-1][:-1] + turn.prompt, turn.max_tokens), turn.stops))
        return texts[1:]

    @property
    def generated(self) -> bytes:
        return b"".join(text[-turn.max_tokens :] for text, turn in zip(self.texts, self.turns, strict=True))

    @property
    def last_arrival(self) -> int:
        return self.end

    def arriving(self, step: int, segment_size: int, prefix_caching: bool) -> Iterator[Request]:
        """The turns, and the end, which is a request of one token that is not read."""
        for turn in self.turns:
            if turn.arrival == step:
                piece = replace(
                    self, prompt=turn.prompt, max_tokens=turn.max_tokens, stops=turn.stops, streams_input=True
                )
                yield piece.request(segment_size, prefix_caching)
        if step == self.end:
            yield replace(self, prompt=b"\0").request(segment_size, prefix_caching)


class Simulation:
    """Runs documents through a scheduler, step by step, and checks each step."""

    def __init__(self, scheduler: SegmentScheduler, documents: list[Document]) -> None:
        self.scheduler = scheduler
        self.segment_size = scheduler.block_size
        self.caching = scheduler.cache_config.enable_prefix_caching
        self.is_async = scheduler.scheduler_config.async_scheduling
        self.documents = {document.name: document for document in documents}
        # an asynchronous step may compute the last token too, before it is known to be the last
        self.texts = {document.name: document.texts[0] + b"\0" for document in documents}
        config = scheduler.vllm_config
        spec = scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec
        columns = spec.max_num_blocks_per_req(config, config.model_config.max_model_len)
        self.worker = Worker(config.model_config.hf_config, columns)
        self.outputs: dict[str, list[int]] = {document.name: [] for document in documents}
        self.finish_reasons: dict[str, FinishReason | None] = {}
        self.steps: list[dict[str, int]] = []
        self.num_preemptions = 0
        self.num_hit_tokens = 0
        self.max_pages = 0
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._unserved: dict[str, int] = {}
        self._turns: dict[str, int] = {}
        self._find_hit = scheduler._get_local_prefix_cache_hit
        setattr(scheduler, "_get_local_prefix_cache_hit", self._checked_hit)  # noqa: B010  (a method, to mypy)

    def run(self, max_steps: int = 2000) -> Simulation:
        """Run until everything is finished; all pages have to be free then."""
        while not self.is_done():
            assert len(self.steps) < max_steps, "starved"
            self.step()
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "pages have leaked"
        return self

    def is_done(self) -> bool:
        return (
            all(document.last_arrival < len(self.steps) for document in self.documents.values())
            and not self.scheduler.requests
            and not self._in_flight
        )

    def step(self) -> SchedulerOutput:
        """Let documents come and go, schedule and execute a step, and process the oldest one in flight."""
        now = len(self.steps)
        for document in self.documents.values():
            for request in document.arriving(now, self.segment_size, self.caching):
                self.scheduler.add_request(request)
            if document.abort == now:
                self.scheduler.finish_requests(document.name, RequestStatus.FINISHED_ABORTED)
        decodes, reading = self._decodes(), self._reading()
        output = self.scheduler.schedule()
        self.steps.append(dict(output.num_scheduled_tokens))
        self.num_preemptions += len(output.preempted_req_ids or ())
        self._check(output, decodes, reading)
        self._begin_turns(output)
        known = {name: request.num_tokens for name, request in self.scheduler.requests.items()}
        result = self.worker.execute(output, self.texts, known)
        self._check_published()
        if output.num_scheduled_tokens:
            self._in_flight.append((output, result))
        if self._in_flight and (len(self._in_flight) > self.is_async or not output.num_scheduled_tokens):
            self._process()
        return output

    def _checked_hit(self, request: Request, *args: Any) -> Any:
        """What the scheduler finds in the prefix cache, if it is what a walk through the text finds."""
        hit = self._find_hit(request, *args)
        kept = {block.block_hash for block in self.scheduler.kv_cache_manager.block_pool.blocks}
        usable = self.scheduler._segmentation(request).closed_tokens(request.num_tokens - 1) // self.segment_size
        hashes = [make_block_hash_with_group_id(block_hash, 0) for block_hash in request.block_hashes[:usable]]
        if request.skip_reading_prefix_cache:
            hashes = []
        segments = max((i for i, block_hash in enumerate(hashes, 1) if block_hash in kept), default=0)
        assert hit[1] == segments * self.segment_size, "the prefix cache has something else"
        assert not segments or hit[0].blocks[0][-1].block_hash == hashes[segments - 1]
        return hit

    def _begin_turns(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            turn = self._turns[new.req_id] = self._turns.get(new.req_id, -1) + 1
            self.texts[new.req_id] = self.documents[new.req_id].texts[turn] + b"\0"

    def _process(self) -> None:
        for outputs in self.scheduler.update_from_output(*self._in_flight.popleft()).values():
            for output in outputs.outputs:
                self.outputs[output.request_id] += output.new_token_ids
                self.finish_reasons[output.request_id] = output.finish_reason

    def _decodes(self) -> set[str]:
        return {
            request.request_id
            for request in self.scheduler.running
            if request.num_computed_tokens >= prefill_end(request)
            and request.num_computed_tokens + 1 < request.num_prompt_tokens + request.max_tokens
            and not self._may_wait(request)
        }

    def _may_wait(self, request: Request) -> bool:
        """Whether the next token may be taken back, and is the first or the last of its segment."""
        token = request.num_computed_tokens
        at_boundary = token % self.segment_size in (0, self.segment_size - 1)
        return request.resumable and token >= request.num_tokens and at_boundary

    def _reading(self) -> set[str]:
        return {request.request_id for request in self.scheduler._documents()}

    def _check(self, output: SchedulerOutput, decodes: set[str], reading: set[str]) -> None:
        scheduled = output.num_scheduled_tokens
        running = {request.request_id for request in self.scheduler.running}
        for new in output.scheduled_new_reqs:
            self.num_hit_tokens += new.num_computed_tokens
        for request in self.scheduler.running:
            end = request.num_computed_tokens
            start = end - scheduled.get(request.request_id, 0)
            if start < end and start < prefill_end(request):
                segmentation = self.scheduler._segmentation(request)
                inside = end - segmentation.begin(segmentation.segment(end))
                assert inside % self.segment_size == 0 or end == request.num_tokens, "a chunk ends inside a page"
        if not output.preempted_req_ids:
            assert decodes <= scheduled.keys(), "a decode is left out"
            for name in running:
                waits = name in reading and name not in scheduled
                self._unserved[name] = self._unserved.get(name, 0) + 1 if waits else 0
                assert self._unserved[name] <= self.scheduler.max_num_running_reqs, f"{name} starves"
        for name, blocks in self.scheduler._pages.req_to_blocks.items():
            request = self.scheduler.requests[name]
            segmentation = self.scheduler._segmentation(request)
            held = sum(not block.is_null for block in blocks)
            self.max_pages = max(self.max_pages, held)
            retained = segmentation.retained(max(request.num_computed_tokens, 1), self.segment_size)
            assert held <= 3 + 2 * self.is_async + len(retained) - 2
            published = [column for column, block in enumerate(blocks) if block.block_hash is not None]
            assert segmentation.last is None or not published or published[-1] < segmentation.last

    def _check_published(self) -> None:
        """Whether what requests hold, and others can find, is what its hash says."""
        for name, blocks in self.scheduler._pages.req_to_blocks.items():
            for column, block in enumerate(blocks):
                if block.block_hash is not None:
                    self.worker.check_memory(name, column, block.block_id, self.texts[name])


def simulate(
    documents: list[Document],
    segment_size: int = 4,
    pages: int = 64,
    slots: int = 4,
    budget: int = 64,
    prefix_caching: bool = True,
    **config: Any,
) -> Simulation:
    """A simulation that has not begun."""
    vllm = vllm_config(segment_size=segment_size, slots=slots, budget=budget, **config)
    return Simulation(make_scheduler(vllm, pages, prefix_caching=prefix_caching), documents)


def open_begin(prompt: int, segment_size: int, alignment: str) -> int:
    """The first token of the segment that a prompt of so many tokens leaves open."""
    segmentation = Segmentation.of_prompt(segment_size, alignment, True, prompt)
    assert segmentation.last is not None
    return segmentation.begin(segmentation.last)

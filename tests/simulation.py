"""A scheduler of vLLM's without a model, and a worker that checks what every step reads and writes.

The simulated worker knows pages by what they hold: the memory after a text, or the KV of the open segment
at its end. Reading a page that holds anything else fails, which catches nearly every allocator bug.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_armt.cache import SegmentSpec
from vllm_armt.core import kept_segments
from vllm_armt.scheduler import SegmentScheduler, prefill_end

MAX_MODEL_LEN = 1 << 21
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
            "generation_policy": "commit",
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
    *, slots: int, budget: int, is_async: bool = False, policy: str = "fcfs", generation_policy: str = "commit"
) -> VllmConfig:
    config = copy.copy(_vllm_config())
    config.cache_config = copy.copy(config.cache_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_seqs = slots
    config.scheduler_config.max_num_batched_tokens = budget
    config.scheduler_config.max_num_scheduled_tokens = None
    config.scheduler_config.async_scheduling = is_async
    config.scheduler_config.policy = policy
    config.model_config = copy.copy(config.model_config)
    config.model_config.hf_config = copy.copy(config.model_config.hf_config)
    config.model_config.hf_config.generation_policy = generation_policy
    return config


def make_scheduler(
    segment_size: int, pages: int, config: VllmConfig, *, prefix_caching: bool = True
) -> SegmentScheduler:
    """A scheduler over `pages` usable pages."""
    config.cache_config.block_size = segment_size
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

    @property
    def text(self) -> bytes:
        """Prompt and generation; what is generated at a position is the same for all."""
        end = len(self.prompt) + self.max_tokens
        return self.prompt + bytes(200 + i % 7 for i in range(len(self.prompt), end))

    def request(self, segment_size: int, prefix_caching: bool) -> Request:
        return Request(
            request_id=self.name,
            prompt_token_ids=list(self.prompt),
            sampling_params=SamplingParams(
                max_tokens=self.max_tokens, ignore_eos=True, prompt_logprobs=1 if self.prompt_logprobs else None
            ),
            pooling_params=None,
            arrival_time=float(self.arrival),
            priority=self.priority,
            block_hasher=get_request_block_hasher(segment_size, sha256) if prefix_caching else None,
        )


class Worker:
    """Executes steps on pages that are labels, after the executor's rule."""

    def __init__(self, segment_size: int) -> None:
        self.segment_size = segment_size
        self.pages: dict[int, tuple[str, int]] = {}
        self.tables: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}

    def execute(self, output: SchedulerOutput, texts: dict[str, bytes], known: dict[str, int]) -> ModelRunnerOutput:
        """Run a step; `known` is how many tokens of each request the scheduler knows."""
        self._follow(output)
        reads: dict[int, str] = {}
        writes: dict[int, tuple[str, int]] = {}
        sampled = {}
        for name, n in output.num_scheduled_tokens.items():
            start, end = self.computed[name], self.computed[name] + n
            for page, content in self._reads(name, start, texts[name]).items():
                assert self.pages.get(page) == content, f"{name} reads {page} at {start}"
                reads[page] = name
            for page, content in self._writes(name, start, end, texts[name]).items():
                assert page not in writes, f"page {page} is written twice"
                writes[page] = content
            self.computed[name] = end
            sampled[name] = [texts[name][end]] if end >= known[name] else []
        for page, name in reads.items():
            assert page not in writes or page in self._own_writes(output, name), f"{name} reads {page} in flux"
        self.pages |= writes
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={name: i for i, name in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
        )

    def _follow(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            self.computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                self.tables[name] = []
                self.computed[name] = computed
            assert self.computed[name] == computed, "a token is skipped or computed twice"
            self.tables[name] += blocks[0] if blocks else []

    def _reads(self, name: str, start: int, text: bytes) -> dict[int, tuple[str, int]]:
        segment, offset = divmod(start, self.segment_size)
        table = self.tables[name]
        pages = {}
        if segment:
            pages[table[segment - 1]] = ("memory", hash(text[: start - offset]))
        if offset:
            pages[table[segment]] = ("kv", hash(text[:start]))
        assert 0 not in pages, "the null page is read"
        return pages

    def _writes(self, name: str, start: int, end: int, text: bytes) -> dict[int, tuple[str, int]]:
        first, table = start // self.segment_size, self.tables[name]
        kept = kept_segments(end, self.segment_size)
        assert len(table) == kept[-1] + 1
        pages = {}
        for segment in range(first, len(table)):
            assert (table[segment] != 0) == (segment in kept), f"column {segment} of a chunk to {end}"
            closes = (segment + 1) * self.segment_size
            if segment in kept:
                kind = "memory" if closes <= end else "kv"
                pages[table[segment]] = (kind, hash(text[: min(closes, end)]))
        return pages

    def _own_writes(self, output: SchedulerOutput, name: str) -> list[int]:
        first = (self.computed[name] - output.num_scheduled_tokens[name]) // self.segment_size
        return self.tables[name][first:]


class Simulation:
    """Runs documents through a scheduler, step by step, and checks each step."""

    def __init__(self, scheduler: SegmentScheduler, documents: list[Document]) -> None:
        self.scheduler = scheduler
        self.segment_size = scheduler.block_size
        self.caching = scheduler.cache_config.enable_prefix_caching
        self.is_async = scheduler.scheduler_config.async_scheduling
        self.documents = {document.name: document for document in documents}
        # an asynchronous step may compute the last token too, before it is known to be the last
        self.texts = {document.name: document.text + b"\0" for document in documents}
        self.worker = Worker(self.segment_size)
        self.outputs: dict[str, list[int]] = {document.name: [] for document in documents}
        self.finish_reasons: dict[str, FinishReason | None] = {}
        self.steps: list[dict[str, int]] = []
        self.num_preemptions = 0
        self.num_hit_tokens = 0
        self.max_pages = 0
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._unserved: dict[str, int] = {}

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
            all(document.arrival < len(self.steps) for document in self.documents.values())
            and not self.scheduler.requests
            and not self._in_flight
        )

    def step(self) -> SchedulerOutput:
        """Let documents come and go, schedule and execute a step, and process the oldest one in flight."""
        now = len(self.steps)
        for document in self.documents.values():
            if document.arrival == now:
                self.scheduler.add_request(document.request(self.segment_size, self.caching))
            if document.abort == now:
                self.scheduler.finish_requests(document.name, RequestStatus.FINISHED_ABORTED)
        decodes, reading = self._decodes(), self._reading()
        output = self.scheduler.schedule()
        self.steps.append(dict(output.num_scheduled_tokens))
        self.num_preemptions += len(output.preempted_req_ids or ())
        self._check(output, decodes, reading)
        known = {name: request.num_tokens for name, request in self.scheduler.requests.items()}
        result = self.worker.execute(output, self.texts, known)
        if output.num_scheduled_tokens:
            self._in_flight.append((output, result))
        if self._in_flight and (len(self._in_flight) > self.is_async or not output.num_scheduled_tokens):
            self._process()
        return output

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
        }

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
                assert end % self.segment_size == 0 or end == request.num_tokens, "a chunk ends inside a segment"
        if not output.preempted_req_ids:
            assert decodes <= scheduled.keys(), "a decode is left out"
            for name in running:
                waits = name in reading and name not in scheduled
                self._unserved[name] = self._unserved.get(name, 0) + 1 if waits else 0
                assert self._unserved[name] <= self.scheduler.max_num_running_reqs, f"{name} starves"
        for blocks in self.scheduler._pages.req_to_blocks.values():
            held = sum(not block.is_null for block in blocks)
            self.max_pages = max(self.max_pages, held)
            assert held <= 3 + 2 * self.is_async

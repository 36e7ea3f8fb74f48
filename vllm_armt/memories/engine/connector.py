"""The KV connector through which vLLM brings pages of memories and keeps them; see `admission` and `page_io`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from vllm_armt.config import RecurrentConfig
from vllm_armt.integration.builder import PagedLayer
from vllm_armt.memories.engine.admission import Admission
from vllm_armt.memories.engine.page_io import PageIO
from vllm_armt.memories.engine.page_tensors import PageTensors
from vllm_armt.memories.engine.prefix_tier import PrefixTier
from vllm_armt.memories.engine.transfers import Transfers
from vllm_armt.memories.identity import open_store
from vllm_armt.options import Options

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class MemoryConnector(KVConnectorBase_V1, SupportsHMA):
    """One in the scheduler and one in each worker.

    Attributes:
        admission: the scheduler's half; only there.
        io: a worker's half; only there.
    """

    admission: Admission
    io: PageIO

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config: RecurrentConfig = vllm_config.model_config.hf_config
        store, S = open_store(vllm_config), config.segment_size
        if role == KVConnectorRole.SCHEDULER:
            (group,) = kv_cache_config.kv_cache_groups
            self.admission = Admission(
                store,
                config.segmentation,
                S,
                vllm_config.model_config.max_model_len,
                group.kv_cache_spec.page_size_bytes * len(group.layer_names),
                vllm_config.parallel_config.world_size,
                lambda request_id: self._kv_cache_manager.get_block_ids(request_id)[0],  # type: ignore[union-attr]
                PrefixTier(store, S) if Options.of(vllm_config).keeps_prefixes else None,
            )
        else:
            context = vllm_config.compilation_config.static_forward_context
            layers = [layer for layer in context.values() if isinstance(layer, PagedLayer)]
            rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            kv_heads = vllm_config.model_config.get_total_num_kv_heads()
            tensors = PageTensors(layers, config.segment_layout, kv_heads, rank, ranks)
            self.io = PageIO(store, tensors, S, is_writer=rank == 0)

    @property
    def requires_kv_delivery(self) -> bool:
        """Requests that only use memories may be preempted as others are; `MemoryScheduler` sees to those that save."""
        return False

    # the scheduler's half -------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        self.admission.look_up(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.admission.matched_tokens(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.admission.admitted(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Transfers:
        return self.admission.fill(scheduler_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self.admission.finished(request)

    def has_pending_push_work(self) -> bool:
        return self.admission.saves.are_waited_for

    # a worker's half ------------------------------------------------------------------------------------------------

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self.io.step_starts(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self.io.load(self._transfers)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Pages are complete before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Pages are saved whole."""

    def wait_for_save(self) -> None:
        self.io.step_ends(self._transfers)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self.io.report(self._transfers)

    @property
    def _transfers(self) -> Transfers:
        transfers = self._get_connector_metadata()
        assert isinstance(transfers, Transfers)
        return transfers

    # both -----------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.SCHEDULER:
            self.admission.shutdown()
        else:
            self.io.shutdown()

"""Everything of vLLM's that vllm-armt leans on although vLLM promises nothing of it, and where it was read.

A new vLLM is checked against this list first. `tests/integration/test_borrowed.py` names what stands differently in
the installed version, and what of ours is missing here; `make compat VLLM=...` runs it on another version. Not listed
is what vLLM documents for its users and for those who bring models to it (`PUBLIC`).
"""

READ_IN = "0.32.0"
"""The version that the lines are of."""

BORROWED: dict[str, dict[int, str]] = {
    # integration/plugin.py, hooks.py: extended, called or set
    "model_executor/models/config.py": {
        20: "VerifyAndUpdateConfig.verify_and_update_config(vllm_config)",
        1063: "MODELS_CONFIG_MAP",
    },
    "transformers_utils/model_arch_config_convertor.py": {
        36: "ModelArchConfigConvertorBase.hf_config",
        37: "ModelArchConfigConvertorBase.hf_text_config",
        388: "ModelArchConfigConvertorBase.rswa_window(self)",
        394: "ModelArchConfigConvertorBase.derive_max_model_len_and_key(self)",
        822: "MODEL_ARCH_CONFIG_CONVERTORS",
    },
    "config/vllm.py": {
        133: "OptimizationLevel.O2",
        577: "VllmConfig.max_concurrent_batches(self)",
        2629: "VllmConfig.try_verify_and_update_config(self)",
    },
    "config/model.py": {
        2527: (
            "_get_and_verify_max_len(hf_config, model_arch_config, tokenizer_config, max_model_len, "
            "disable_sliding_window, sliding_window, ...)"
        )
    },
    "config/cache.py": {
        77: "CacheConfig.user_specified_block_size",
        219: "CacheConfig.num_gpu_blocks",
    },
    "config/parallel.py": {641: "ParallelConfig.use_ubatching(self)"},
    "config/compilation.py": {
        41: "CompilationMode.NONE",
        59: "CUDAGraphMode.NONE",
        757: "CompilationConfig.static_forward_context",
    },
    # integration/scheduler.py: extended, called or read
    "v1/core/sched/scheduler.py": {
        85: "Scheduler.__init__(self, vllm_config, kv_cache_config, structured_output_manager, block_size, ...)",
        96: "Scheduler.vllm_config",
        122: "Scheduler.finished_req_ids_dict",
        129: "Scheduler.max_num_running_reqs",
        132: "Scheduler.max_num_active_reqs",
        137: "Scheduler.max_num_scheduled_tokens",
        104: "Scheduler.log_stats",
        164: "Scheduler.connector",
        209: "Scheduler.block_size",
        214: "Scheduler.requests",
        223: "Scheduler.waiting",
        227: "Scheduler.kv_holding_waiting",
        231: "Scheduler.running",
        244: "Scheduler.num_waiting_for_streaming_input",
        328: "Scheduler.kv_cache_manager",
        377: "Scheduler.need_mamba_block_aligned_split",
        430: "Scheduler._pause_state",
        443: (
            "Scheduler._mamba_block_aligned_split(self, request, num_new_tokens, num_new_local_computed_tokens=0,"
            " num_external_computed_tokens=0)"
        ),
        558: "Scheduler._get_local_prefix_cache_hit(self, request)",
        591: "Scheduler.schedule(self, throttle_prefills=False)",
        1571: "Scheduler._preempt_request(self, request, timestamp, drop_stale_output=False)",
        2026: "Scheduler.update_from_output(self, scheduler_output, model_runner_output)",
        2437: "Scheduler._is_blocked_waiting_status(status)",
        2493: "Scheduler._update_request_with_output(self, request, new_token_ids, is_stale=False)",
        2616: "Scheduler.add_request(self, request)",
        2649: "Scheduler.finish_requests(self, request_ids, finished_status)",
        2766: "Scheduler._free_request_blocks(self, request)",
        2823: "Scheduler.has_requests(self)",
        2915: "Scheduler.make_stats(self, ...)",
        3175: "Scheduler._handle_blocked_waiting_request(self, request)",
    },
    "v1/core/sched/async_scheduler.py": {14: "AsyncScheduler"},
    "v1/core/sched/interface.py": {33: "PauseState.UNPAUSED"},
    "v1/core/sched/output.py": {
        86: "NewRequestData.prompt_len(self)",
        232: "SchedulerOutput",
    },
    "v1/request.py": {
        84: "Request.request_id",
        87: "Request.sampling_params",
        100: "Request.status",
        102: "Request.stop_reason",
        111: "Request.max_tokens",
        143: "Request.num_prompt_tokens",
        148: "Request._all_token_ids",
        184: "Request.num_computed_tokens",
        185: "Request.cache_salt",
        218: "Request.prefill_stats",
        225: "Request.block_hashes",
        232: "Request.skip_reading_prefix_cache",
        235: "Request.resumable",
        285: "Request.update_block_hashes(self)",
        295: "Request.num_tokens(self)",
        303: "Request.num_output_tokens(self)",
        344: "Request.take_events(self)",
        377: "RequestStatus.RUNNING",
        382: "RequestStatus.FINISHED_LENGTH_CAPPED",
        385: "RequestStatus.FINISHED_ERROR",
    },
    "v1/core/kv_cache_manager.py": {
        35: "KVCacheBlocks",
        167: "KVCacheManager.coordinator",
        208: "KVCacheManager.watermark_blocks",
        249: "KVCacheManager.prefix_cache_lookup_enabled(self, request)",
        794: "KVCacheManager.create_kv_cache_blocks(self, blocks)",
    },
    "v1/core/kv_cache_coordinator.py": {
        157: "KVCacheCoordinator.single_type_managers",
        460: "KVCacheCoordinator.find_longest_cache_hit(self, block_hashes, max_cache_hit_length)",
    },
    # integration/cache: extended, called or read
    "v1/kv_cache_spec_registry.py": {
        43: "KVCacheSpecRegistry._ensure_registered(cls, vllm_config=None)",
        61: "KVCacheSpecRegistry.register(cls, kvcache_spec_cls, manager_class=None, uniform_type_base_spec=None)",
    },
    "v1/kv_cache_interface.py": {
        169: "KVCacheSpec.block_size",
        218: "KVCacheSpec.page_size_bytes(self)",
        237: "KVCacheSpec.block_table_token_alignment(self)",
        240: "KVCacheSpec.max_memory_usage_bytes(self, vllm_config)",
        298: "KVCacheSpec.uses_slot_mapping(self)",
        512: "AttentionSpec.dcp_sharded",
        516: "AttentionSpec.num_kv_heads",
        517: "AttentionSpec.head_size",
        518: "AttentionSpec.dtype",
        522: "AttentionSpec.num_head_slots",
        526: "AttentionSpec.state_content_bytes",
        528: "AttentionSpec.tokens_per_state",
        569: "AttentionSpec.max_num_blocks_per_req(self, vllm_config, max_len)",
        1467: "KVCacheConfig.kv_cache_groups",
    },
    "v1/core/single_type_kv_cache_manager.py": {
        68: (
            "SingleTypeKVCacheManager.__init__(self, kv_cache_spec, block_pool, enable_caching, "
            "kv_cache_group_id, scheduler_block_size, ...)"
        ),
        108: "SingleTypeKVCacheManager.block_size",
        109: "SingleTypeKVCacheManager.kv_cache_spec",
        110: "SingleTypeKVCacheManager.block_pool",
        125: "SingleTypeKVCacheManager.req_to_blocks",
        131: "SingleTypeKVCacheManager.num_cached_block",
        133: "SingleTypeKVCacheManager.kv_cache_group_id",
        134: "SingleTypeKVCacheManager._null_block",
        160: "SingleTypeKVCacheManager._get_num_evictable_blocks(cls, blocks)",
        175: (
            "SingleTypeKVCacheManager.get_num_blocks_to_allocate(self, request_id, num_tokens, "
            "new_computed_blocks, total_computed_tokens, num_local_computed_tokens, num_tokens_main_model, "
            "apply_admission_cap=False, prefill_end=0)"
        ),
        369: "SingleTypeKVCacheManager.allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model)",
        476: (
            "SingleTypeKVCacheManager.cache_blocks(self, request, num_tokens, retention_interval=None, *, "
            "replay_boundaries)"
        ),
        562: "SingleTypeKVCacheManager.pop_blocks_for_free(self, request_id)",
        593: (
            "SingleTypeKVCacheManager.find_longest_cache_hit(cls, block_hashes, max_length, kv_cache_group_ids, "
            "block_pool, kv_cache_spec, drop_eagle_block, alignment_tokens, dcp_world_size=1, pcp_world_size=1)"
        ),
        645: "SingleTypeKVCacheManager._remove_blocks_in_range(self, request_id, first_block, last_block)",
        672: (
            "SingleTypeKVCacheManager.remove_skipped_blocks(self, request_id, processed_computed_tokens, "
            "num_prompt_tokens=None)"
        ),
        712: "SingleTypeKVCacheManager.get_num_skipped_tokens(self, num_computed_tokens)",
        725: "SingleTypeKVCacheManager.new_step_starts(self)",
    },
    "v1/core/block_pool.py": {
        167: "BlockPool.num_gpu_blocks",
        181: "BlockPool.cached_block_hash_to_block",
        187: "BlockPool.null_block",
        198: "BlockPool.get_cached_block(self, block_hash, kv_cache_group_ids)",
        666: "BlockPool.get_new_blocks(self, num_blocks)",
        774: "BlockPool.free_blocks(self, ordered_blocks)",
        868: "BlockPool.get_num_free_blocks(self)",
    },
    "v1/core/kv_cache_utils.py": {
        61: "BlockHash",
        200: "KVCacheBlock.is_null",
        2763: "BlockHashList",
    },
    # integration/builder.py: extended or read
    "v1/attention/backend.py": {
        62: "AttentionBackend.supported_dtypes",
        80: "AttentionBackend.get_name()",
        85: "AttentionBackend.get_impl_cls()",
        90: "AttentionBackend.get_builder_cls()",
        379: "AttentionMetadata",
        395: "CommonAttentionMetadata.query_start_loc_cpu",
        401: "CommonAttentionMetadata.num_reqs",
        411: "CommonAttentionMetadata.block_table_tensor",
        444: "CommonAttentionMetadata.seq_lens_cpu_upper_bound",
        461: "CommonAttentionMetadata.rswa_prefix_lens",
        610: "AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)",
        683: "AttentionMetadataBuilder.build(self, common_prefix_len, common_attn_metadata, fast_build=False)",
        887: "AttentionImpl",
    },
    "model_executor/layers/attention_layer_base.py": {
        27: "AttentionLayerBase.bind_kv_cache(self, kv_cache)",
        33: "AttentionLayerBase.kv_cache",
        36: "AttentionLayerBase.get_attn_backend(self)",
        41: "AttentionLayerBase.get_kv_cache_spec(self, vllm_config)",
    },
    # integration/model_state.py: extended or read
    "v1/worker/gpu/model_states/default.py": {
        32: "DefaultModelState.__init__(self, vllm_config, model, encoder_cache, device)",
        67: "DefaultModelState.add_request(self, req_index, new_req_data)",
        169: (
            "DefaultModelState.prepare_attn(self, input_batch, cudagraph_mode, block_tables, slot_mappings, "
            "attn_groups, kv_cache_config, ...)"
        ),
    },
    "v1/worker/gpu/model_states/interface.py": {56: "ModelState.model", 59: "ModelState.max_num_reqs"},
    "v1/worker/gpu/input_batch.py": {
        47: "InputBatch.idx_mapping_np",
        104: "InputBatch.prompt_lens",
    },
    # integration/worker.py: extended or read
    "v1/worker/cpu_worker.py": {32: "CPUWorker"},
    "v1/worker/gpu_worker.py": {
        558: "Worker.model_runner",
        1295: "Worker.sample_tokens(self, grammar_output)",
        1302: "Worker.execute_model(self, scheduler_output)",
    },
    "v1/worker/cpu_model_runner.py": {23: "CPUModelRunner"},
    "v1/worker/gpu_model_runner.py": {
        686: "GPUModelRunner.num_prompt_logprobs",
        714: "GPUModelRunner.input_batch",
        815: "GPUModelRunner.discard_request_mask",
        3112: "GPUModelRunner.get_model(self)",
        3468: (
            "GPUModelRunner._bookkeeping_sync(self, scheduler_output, sampler_output, logits, hidden_states, "
            "num_scheduled_tokens)"
        ),
    },
    "v1/worker/gpu_input_batch.py": {
        263: "InputBatch.generators",
        1104: "InputBatch.num_reqs(self)",
    },
    # memories/, integration/memory_scheduler.py, refusals.py: extended, called or read
    "distributed/kv_transfer/kv_connector/v1/base.py": {
        107: "SupportsHMA.request_finished_all_groups(self, request, block_ids)",
        140: "KVConnectorRole.SCHEDULER",
        154: "KVConnectorMetadata",
        173: "KVConnectorWorkerMetadata.aggregate(self, other)",
        197: "KVConnectorBase_V1.requires_kv_delivery(self)",
        208: "KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)",
        225: "KVConnectorBase_V1._kv_cache_manager",
        229: "KVConnectorBase_V1.role(self)",
        264: "KVConnectorBase_V1._get_connector_metadata(self)",
        311: "KVConnectorBase_V1.handle_preemptions(self, kv_connector_metadata)",
        318: "KVConnectorBase_V1.start_load_kv(self, forward_context, **kwargs)",
        371: "KVConnectorBase_V1.wait_for_save(self)",
        431: "KVConnectorBase_V1.shutdown(self)",
        461: "KVConnectorBase_V1.build_connector_worker_meta(self)",
        475: "KVConnectorBase_V1.bind_kv_cache_manager(self, kv_cache_manager)",
        501: "KVConnectorBase_V1.get_num_new_matched_tokens(self, request, num_computed_tokens)",
        554: "KVConnectorBase_V1.update_state_after_alloc(self, request, blocks, num_external_tokens)",
        580: "KVConnectorBase_V1.build_connector_meta(self, scheduler_output)",
        598: "KVConnectorBase_V1.on_new_request(self, request)",
        663: "KVConnectorBase_V1.has_pending_push_work(self)",
    },
    "distributed/parallel_state.py": {
        1588: "get_tp_group()",
    },
    # integration/prometheus.py: extended, read or added to
    "v1/engine/async_llm.py": {
        195: "AsyncLLM.logger_manager",
    },
    "v1/metrics/loggers.py": {
        66: "StatLoggerBase.record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0)",
        75: "StatLoggerBase.log_engine_initialized(self)",
        77: "StatLoggerBase.log(self)",
        101: "AggregateStatLoggerBase",
        1379: "StatLoggerManager.engine_indexes",
        1380: "StatLoggerManager.stat_loggers",
    },
    "v1/metrics/utils.py": {
        11: "create_metric_per_engine(metric, per_engine_labelvalues)",
    },
    "v1/metrics/stats.py": {
        251: "SchedulerStats.running_lora_adapters",
        323: "PrefillStats.num_local_cached_tokens",
        327: ("PrefillStats.set(self, num_prompt_tokens, num_local_cached_tokens, num_external_cached_tokens)"),
        342: "PrefillStats.finalize(self, num_cached_tokens)",
    },
    "v1/engine/__init__.py": {
        65: "FinishReason.ERROR",
        214: "EngineCoreOutput.stop_reason",
        216: "EngineCoreOutput.kv_transfer_params",
        271: "EngineCoreOutputs.outputs",
    },
    "model_executor/model_loader/weight_utils.py": {
        432: (
            "download_weights_from_hf(model_name_or_path, cache_dir, allow_patterns, revision=None,"
            " subfolder=None, ignore_patterns=None)"
        ),
    },
    "entrypoints/serve/engine/protocol.py": {
        105: "ModelCard",
    },
    "entrypoints/openai/chat_completion/protocol.py": {
        220: "ChatCompletionRequest",
    },
    "entrypoints/openai/completion/protocol.py": {
        48: "CompletionRequest",
    },
    "entrypoints/openai/responses/protocol.py": {
        211: "ResponsesRequest",
    },
    "entrypoints/serve/utils/api_utils.py": {
        350: "validate_json_request(raw_request)",
    },
    "renderers/online_renderer.py": {
        153: "OnlineRenderer",
    },
    "exceptions.py": {
        28: "VLLMValidationError",
        141: "GracefulHTTPError",
    },
    "entrypoints/openai/chat_completion/api_router.py": {
        54: "create_chat_completion(request, raw_request)",
    },
    "entrypoints/openai/completion/api_router.py": {
        47: "create_completion(request, raw_request)",
    },
    "entrypoints/openai/responses/api_router.py": {
        60: "create_responses(request, raw_request)",
    },
    "entrypoints/serve/exception_handling/error_response.py": {
        14: (
            "create_error_response(message, err_type='BadRequestError', status_code=HTTPStatus.BAD_REQUEST, param=None)"
        ),
    },
    "renderers/params.py": {
        36: "merge_kwargs(defaults, overrides, /, *, unset_values=(None, 'auto'))",
        80: "ChatParams",
    },
    "distributed/kv_transfer/kv_transfer_state.py": {
        16: "_KV_CONNECTOR_AGENT",
    },
    # integration/reload.py, models/recurrent.py, linear/base.py: called, set or extended
    "model_executor/model_loader/reload/layerwise.py": {
        57: "get_layerwise_info(layer)",
        287: "finalize_layerwise_reload(*args, **kwargs)",
    },
    "model_executor/model_loader/reload/types.py": {
        24: "LayerReloadingInfo.load_numel_total",
        41: "LayerReloadingInfo.can_load(self)",
    },
    "model_executor/model_loader/utils.py": {
        133: "process_weights_after_loading(model, model_config, target_device)",
    },
    "model_executor/layers/quantization/base_config.py": {
        53: "QuantizeMethodBase.apply(self, layer, *args, **kwargs)",
        80: "QuantizeMethodBase.process_weights_after_loading(self, layer)",
    },
    # models/, linear/, attention/, executor/: called or read
    "forward_context.py": {144: "ForwardContext.attn_metadata"},
    "model_executor/layers/vocab_parallel_embedding.py": {
        481: "VocabParallelEmbedding.weight_loader(self, param, loaded_weight)",
        634: "ParallelLMHead.tie_weights(self, embed_tokens)",
    },
    "model_executor/layers/rotary_embedding/base.py": {
        130: "RotaryEmbeddingBase.cos_sin_cache",
        140: (
            "RotaryEmbedding.__init__(self, head_size, rotary_dim, max_position_embeddings, base, is_neox_style, "
            "dtype, ...)"
        ),
    },
    "model_executor/layers/utils.py": {470: "dispatch_cpu_unquantized_gemm(layer, remove_weight)"},
    "platforms/interface.py": {
        86: "CpuArchEnum.POWERPC",
        139: "Platform.device_name",
    },
    "_custom_ops.py": {
        238: "rms_norm(out, input, weight, epsilon)",
        330: "fused_add_rms_norm(input, residual, weight, epsilon)",
        2544: (
            "reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, "
            "v_scale)"
        ),
        3721: "CPUDNNLGEMMHandler.handler_tensor",
        3731: "_supports_onednn",
        3738: "create_onednn_mm(weight, primitive_cache_size=128)",
        3752: "onednn_mm(dnnl_handler, x, bias)",
        3850: (
            "cpu_attn_get_scheduler_metadata(num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, dtype, "
            "query_start_loc, causal, sliding_window_size, isa, enable_kv_split, ...)"
        ),
        3883: "cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, ...)",
        3907: (
            "cpu_attention_with_kv_cache(query, key_cache, value_cache, output, query_start_loc, seq_lens, scale,"
            " causal, alibi_slopes, sliding_window, block_table, softcap, scheduler_metadata, s_aux, ...)"
        ),
    },
    "v1/attention/backends/cpu_attn.py": {
        69: "CPUAttentionBackend.get_supported_head_sizes(cls)",
        520: "_get_attn_isa(dtype, block_size, head_size=None, ...)",
    },
    "v1/attention/backends/fa_utils.py": {
        74: "get_flash_attn_version(..., head_size=None, ..., kv_cache_block_size=None, ...)"
    },
    "vllm_flash_attn/flash_attn_interface.py": {
        176: (
            "flash_attn_varlen_func(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, "
            "seqused_k=None, ..., causal=False, window_size=None, ..., block_table=None, ..., "
            "fa_version=DEFAULT_FA_VERSION, ...)"
        )
    },
    "utils/cache.py": {51: "LRUCache"},
    "utils/math_utils.py": {
        12: "cdiv(a, b)",
        22: "round_up(x, y)",
        27: "round_down(x, y)",
    },
    # cli/bench: called or read
    "v1/engine/llm_engine.py": {
        69: "LLMEngine.vllm_config",
        70: "LLMEngine.model_config",
        116: "LLMEngine.engine_core",
        203: "LLMEngine.has_unfinished_requests(self)",
        224: "LLMEngine.abort_request(self, request_ids, ...)",
        229: "LLMEngine.add_request(self, request_id, prompt, params, ...)",
        319: "LLMEngine.step(self)",
    },
    "v1/engine/core_client.py": {
        373: "InprocClient.engine_core",
        401: "InprocClient.shutdown(self, ...)",
    },
    "v1/engine/core.py": {
        144: "EngineCore.model_executor",
        174: "EngineCore.scheduler",
    },
    "v1/executor/uniproc_executor.py": {54: "UniProcExecutor.driver_worker"},
    "v1/worker/worker_base.py": {245: "WorkerWrapperBase.worker"},
    "v1/worker/utils.py": {280: "AttentionGroup.metadata_builders"},
}
"""By file and line of vLLM's, a function with its parameters, a class, or an attribute.

`...` stands for parameters that need not be given. What methods assign to `self` counts as the class's.
"""

ALSO: dict[str, tuple[str, ...]] = {
    # in 0.33, where auxiliary outputs limit what may be found
    "v1/core/sched/scheduler.py": ("Scheduler._get_local_prefix_cache_hit(self, request, max_cache_hit_length=None)",),
    # abstract in 0.31
    "v1/core/single_type_kv_cache_manager.py": (
        "SingleTypeKVCacheManager.get_num_common_prefix_blocks(self, running_request_id)",
    ),
}
"""What stands in other supported versions, instead of the same name above or besides."""

OPERATORS = {
    "fused_add_rms_norm": "(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    "onednn_mm": "(Tensor! c, Tensor a, Tensor? bias, Tensor handler_tensor) -> ()",
    "rms_norm": "(Tensor! out, Tensor input, Tensor? weight, float epsilon) -> ()",
}
"""Of `torch.ops._C` on CPUs, which linear/ calls without vLLM's wrappers in `_custom_ops.py`: name and schema."""

PUBLIC = frozenset(
    {
        "BaseModelLoader",
        "EngineArgs",
        "EngineClient",
        "GeluAndMul",
        "GemmaRMSNorm",
        "IntermediateTensors",
        "KVTransferConfig",
        "LLM",
        "LogitsProcessor",
        "ModelConfig",
        "ModelRegistry",
        "ParallelLMHead",
        "RMSNorm",
        "RequestOutput",
        "RequestOutputKind",
        "SamplingParams",
        "SiluAndMul",
        "TextPrompt",
        "TokensPrompt",
        "VllmConfig",
        "VocabParallelEmbedding",
        "current_platform",
        "get_forward_context",
        "get_rope",
        "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_world_size",
        "init_logger",
        "maybe_prefix",
        "register_model_loader",
        "set_current_vllm_config",
        "tensor_model_parallel_all_reduce",
    }
)
"""What is imported and not borrowed: for users, plugins, and models out of vLLM's tree."""

"""vLLM's endpoint plugin: it is loaded by servers that name it, `VLLM_PLUGINS=armt`, as `vllm-armt serve` does."""

from __future__ import annotations

from argparse import Namespace

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.routing import BaseRoute
from vllm.engine.protocol import EngineClient

from vllm_armt.config import RecurrentConfig
from vllm_armt.integration.hooks import MEMORY_CONNECTOR
from vllm_armt.integration.metrics import COUNTERS
from vllm_armt.integration.prometheus import CountsLogger
from vllm_armt.memories.engine.metrics import COUNTERS as MEMORY_COUNTERS
from vllm_armt.memories.errors import MemoriesError
from vllm_armt.memories.http.answers import watch
from vllm_armt.memories.http.names import Names
from vllm_armt.memories.http.renderer import MemoryRenderer
from vllm_armt.memories.http.routes import refuse, router
from vllm_armt.memories.http.service import Service
from vllm_armt.memories.identity import open_store


class MemoriesPlugin:
    """Metrics, and routes for memories; those of vLLM that may name one are replaced by routes that hand on to them."""

    name = "armt"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes in place of vLLM's own of the same paths, which vLLM 0.31 would leave before them."""
        app.state.memories = None
        ours = {place for route in router.routes for place in _places(route)}
        app.router.routes[:] = [route for route in app.router.routes if not _places(route) or _places(route) - ours]
        app.include_router(router)
        app.add_exception_handler(MemoriesError, refuse)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Count what a model of ours does, and let the server's handlers know memories, if it keeps any."""
        if engine_client is None or not isinstance(engine_client.model_config.hf_config, RecurrentConfig):
            return
        transfers = engine_client.vllm_config.kv_transfer_config
        keeps_memories = transfers is not None and transfers.kv_connector == MEMORY_CONNECTOR[0]
        CountsLogger.join(engine_client, COUNTERS | MEMORY_COUNTERS if keeps_memories else COUNTERS)
        if not keeps_memories:
            return
        store = open_store(engine_client.vllm_config)
        renderer = MemoryRenderer.adopt(state.online_renderer, store)
        names = Names([model.name for model in state.openai_serving_models.base_model_paths])
        state.memories = Service(engine_client, store, renderer, names)
        watch(engine_client)
        for handler in (state.openai_serving_completion, state.openai_serving_chat, state.openai_serving_chat_batch):
            # or nothing would say how many tokens were not read again
            handler.enable_prompt_tokens_details = True


def _places(route: BaseRoute) -> set[tuple[str, str]]:
    """Paths and methods of a route."""
    return {(route.path, method) for method in route.methods} if isinstance(route, APIRoute) else set()

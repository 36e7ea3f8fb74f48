"""The memories of a running server: what its routes ask of the store and of the engine.

Whatever waits for the disk or for a tokenizer runs in a thread, and a text is read by a task of its own, beside the
requests that come meanwhile.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from threading import Lock
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from vllm_armt.config import RecurrentConfig
from vllm_armt.memories.chat import Message
from vllm_armt.memories.disk.builds import Options
from vllm_armt.memories.disk.manifest import Manifest
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.errors import InvalidInput, MemoriesError
from vllm_armt.memories.http.metrics import Metrics
from vllm_armt.memories.http.names import Names
from vllm_armt.memories.http.renderer import MemoryRenderer
from vllm_armt.memories.reading import Behind, read, read_async
from vllm_armt.memories.texts import TokenIds, Tokens, leading_ids
from vllm_armt.options import Options as ServerOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

REFRESH_SECONDS = 10.0
"""Between two looks at what is in the folder, for the metrics."""
COLLECT_SECONDS = 600.0
"""Between two collections of what nobody needs."""

P = ParamSpec("P")
T = TypeVar("T")


class Service:
    """Of one API server.

    Attributes:
        store: the memories.
        names: as which they are models.
        renderer: of the server.
        max_upload_bytes: that a client may send at once.
    """

    def __init__(self, engine: EngineClient, store: Store, renderer: MemoryRenderer, names: Names) -> None:
        vllm_config: VllmConfig = engine.vllm_config
        config: RecurrentConfig = vllm_config.model_config.hf_config
        self.store, self.names, self.renderer = store, names, renderer
        self._metrics = Metrics(names.bases[0])
        self.max_upload_bytes = ServerOptions.of(vllm_config).memories_max_upload_bytes
        self._engine = engine
        self._segment_size, self._max_model_len = config.segment_size, vllm_config.model_config.max_model_len
        self._builds: dict[str, asyncio.Task[Manifest]] = {}
        self._changed = asyncio.Event()
        self._upkeep = asyncio.create_task(self._keep_up())
        self._encoding = Lock()

    # texts ----------------------------------------------------------------------------------------------------------

    @cached_property
    def _tokenizer(self) -> Any:
        # one that is used in another thread meanwhile raises
        return copy.deepcopy(self.renderer.renderer.get_tokenizer())

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens; in any thread."""
        with self._encoding:
            return self._tokenizer.encode(text, add_special_tokens=False)

    def beginning(self, parent: Manifest | None) -> list[int]:
        """The ids that stand before a text behind a memory; in any thread."""
        if parent is not None and parent.tokens:
            return []
        with self._encoding:
            return leading_ids(self._tokenizer)

    def rendered(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, chat_template_kwargs: dict[str, Any] | None
    ) -> Behind:
        """The ids and roles of messages behind a memory; for any thread but the event loop's."""
        loop = asyncio.get_running_loop()

        def behind(parent: Manifest | None) -> tuple[TokenIds, tuple[str, ...]]:
            text = self.renderer.text_of(messages, parent, tools, chat_template_kwargs)
            ids, outline = asyncio.run_coroutine_threadsafe(text, loop).result()
            return TokenIds(ids), outline.stored

        return behind

    def check_ids(self, ids: list[int]) -> None:
        """Raises: InvalidInput: one is outside the vocabulary."""
        try:
            self.renderer.renderer.validate_token_ids(ids, parameter="input")
        except VLLMValidationError as error:
            raise InvalidInput(str(error)) from None

    # memories -------------------------------------------------------------------------------------------------------

    async def change(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method that changes the folder, in a thread."""
        try:
            return await asyncio.to_thread(method, *args, **kwargs)
        finally:
            self._changed.set()

    async def build(
        self,
        tokens: Tokens,
        done: Callable[[], object] | None = None,
        behind: Behind | None = None,
        **options: Unpack[Options],
    ) -> tuple[Manifest, asyncio.Task[Manifest]]:
        """Begin to read a text into a memory.

        Args:
            done: is called when the text is not needed any more, in any case.
            behind: see `reading.read`; called in a thread.
            options: of the memory.

        Returns:
            The memory in progress, and the task that ends with the complete one.

        Raises:
            MemoriesError: it can't be begun.
        """
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[Manifest] = loop.create_future()

        def tell(memory: Manifest) -> None:
            started = memory.model_copy(update={"progress": (0, tokens.total)})
            loop.call_soon_threadsafe(begun.set_result, started)

        task = asyncio.create_task(self._read(tokens, tell, options, done, behind))
        try:
            await asyncio.wait([begun, task], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not begun.done():
            task.result()
        memory = begun.result()
        self._builds[memory.id] = task
        task.add_done_callback(partial(self._ended, memory.id))
        return memory, task

    def _ended(self, id: str, task: asyncio.Task[Manifest]) -> None:
        del self._builds[id]
        if not task.cancelled():
            # nobody may wait for it, and an error that nobody has looked at is logged, with what it holds
            task.exception()

    async def _read(
        self,
        tokens: Tokens,
        tell: Callable[[Manifest], None],
        options: Options,
        done: Callable[[], object] | None,
        behind: Behind | None,
    ) -> Manifest:
        memory: Manifest | None = None

        def begun(manifest: Manifest) -> None:
            nonlocal memory
            memory = manifest
            tell(manifest)

        reading = read(
            self.store,
            tokens,
            segment_size=self._segment_size,
            max_model_len=self._max_model_len,
            total=tokens.total,
            begun=begun,
            behind=behind,
            **options,
        )
        begin = time.monotonic()
        try:
            complete = await read_async(self._engine, reading)
        except BaseException as error:
            if memory is not None:
                self._metrics.built("failed")
                # the words of a foreign error may hold a piece of the text
                why = str(error) if isinstance(error, MemoriesError) else type(error).__name__
                logger.warning("Memory %s was not completed: %s", memory.id, why)
            raise
        finally:
            self._changed.set()
            if done is not None:
                done()
        self._metrics.built("completed")
        seconds, new = time.monotonic() - begin, complete.tokens - (memory.tokens if memory is not None else 0)
        logger.info(
            "Memory %s is complete: %d tokens read in %.1f s (%.0f a second), %d in all, %d segments, %d bytes.",
            *(complete.id, new, seconds, new / max(seconds, 1e-9), complete.tokens, complete.segments, complete.bytes),
        )
        return complete

    def completed(self, salt: str | None) -> list[Manifest]:
        """All complete memories of a tenant, the newest first; in any thread."""
        found: list[Manifest] = []
        more, after = True, None
        while more:
            memories, more = self.store.list(salt=salt, after=after, limit=1000)
            found += [memory for memory in memories if memory.status == "completed"]
            after = memories[-1].id if memories else None
        return found

    async def delete(self, reference: str, salt: str | None) -> Manifest:
        """Delete a memory; one that this server is reading is read no further."""
        memory = await self.change(self.store.delete, reference, salt=salt)
        if (task := self._builds.get(memory.id)) is not None:
            task.cancel()
        return memory

    # upkeep ---------------------------------------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        collected = time.monotonic()
        while True:
            try:
                if time.monotonic() - collected >= COLLECT_SECONDS:
                    collected = time.monotonic()
                    await asyncio.to_thread(self.store.gc)
                self._metrics.hold(*await asyncio.to_thread(self._held))
            except MemoriesError as error:
                logger.warning("The folder of memories can't be looked after: %s", error)
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REFRESH_SECONDS)

    def _held(self) -> tuple[int, int]:
        now = self.store.clock()
        held = sum(
            memory.status == "completed" and (memory.expires_at is None or memory.expires_at > now)
            for memory in self.store.catalog.scan()
        )
        return held, self.store.usage()

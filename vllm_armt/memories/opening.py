"""Putting a memory in front of a request's prompt.

The prompt becomes `[the last closed segment's ids] + [pending ids] + [its own ids]`. The page of column 0 is brought
from disk, so the first segment that is read is number 1; that it stands for all the text before is in `cache_salt`,
which vLLM hashes into every block of the request.
"""

from __future__ import annotations

import secrets

from vllm.v1.request import Request

from vllm_armt.memories.args import MemoryArgs
from vllm_armt.memories.errors import InvalidInput
from vllm_armt.memories.manifest import Boundary, Manifest
from vllm_armt.memories.session import Session
from vllm_armt.memories.store import Lease, Store
from vllm_armt.memories.usage import SentTokens


class Opening:
    """Of one engine.

    Args:
        store: the memories.
        segment_size: S.
        max_model_len: tokens that a request may have.
    """

    def __init__(self, store: Store, segment_size: int, max_model_len: int) -> None:
        self._store, self._segment_size, self._max_model_len = store, segment_size, max_model_len
        # clients choose their salts, so what stands for a memory is nothing that they can know
        self._secret = secrets.token_hex(16)
        # one lease for all requests on a page: a lease is an open file
        self._leases: dict[str, tuple[Lease, set[Session]]] = {}

    def open(self, request: Request) -> Session | None:
        """Give a new request the memory that it asks for; None if it asks for nothing.

        Raises:
            MemoriesError: it can't be; nothing was changed.
        """
        args = MemoryArgs.of(request.sampling_params)
        if args is None:
            return None
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.mm_features:
            raise InvalidInput("Memories are of text: a prompt of embeddings or with other inputs can't be used.")
        if request.resumable:
            raise InvalidInput("A request that streams its input can't use or save a memory. Send it in one piece.")
        if args.reference is None:
            return self._begin(request, args, None)
        unfinished = args.build_memory is not None
        lease = self._store.use(args.reference, salt=request.cache_salt, unfinished=unfinished)
        try:
            session = self._begin(request, args, lease.memory)
        except BaseException:
            lease.release()
            raise
        self._hold(session, lease)
        return session

    def close(self, session: Session) -> None:
        """Let go of what `open` has taken hold of."""
        page = session.start.page
        if page in self._leases:
            lease, sessions = self._leases[page]
            sessions.discard(session)
            if not sessions:
                del self._leases[page]
                lease.release()

    def shutdown(self) -> None:
        """Let go of everything."""
        for lease, _ in self._leases.values():
            lease.release()
        self._leases.clear()

    def _hold(self, session: Session, lease: Lease) -> None:
        page = session.start.page
        if page is None:
            lease.release()
        elif page in self._leases:
            lease.release()
            self._leases[page][1].add(session)
        else:
            self._leases[page] = lease, {session}

    def _begin(self, request: Request, args: MemoryArgs, memory: Manifest | None) -> Session:
        salt, sent = request.cache_salt, request.prompt_token_ids
        start = Boundary.start(salt) if memory is None else memory.boundary
        before, own = [*start.last, *start.pending], (sent or [])[args.memory_skip :]
        self._check_lengths(start, len(before), len(own))
        if args.save_memory is not None:
            args.save_memory.check(self._store, memory, salt)
        if before or args.memory_skip:
            # a new list: an engine in the process of its client shares the one with it
            request.prompt_token_ids = before + own
            request._all_token_ids[: args.memory_skip] = before
            request.num_prompt_tokens = len(request.prompt_token_ids)
            request.prefill_stats = SentTokens(len(before) - args.memory_skip)
            if start.page is not None:
                request.cache_salt = f"{self._secret} {start.page}"
            # without the cache vLLM would read the ids that stand for a memory as if they were its text
            request.skip_reading_prefix_cache = False
            request.block_hashes.clear()
            request.update_block_hashes()
        return Session(request, args, start, memory, salt)

    def _check_lengths(self, start: Boundary, before: int, own: int) -> None:
        if not own:
            raise InvalidInput("Nothing is left of the prompt behind the memory: give at least one token.")
        if len(start.last) not in (0, self._segment_size):
            raise InvalidInput("The memory was not made with this model's segment_size.")
        if before + own >= self._max_model_len:
            raise InvalidInput(
                f"The prompt has {own} tokens and stands behind {before} of the end of the memory: together "
                f"{before + own}, but fewer than max_model_len ({self._max_model_len}) are allowed. Shorten it, or "
                "append it to the memory in pieces."
            )

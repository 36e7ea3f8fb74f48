"""The prefix cache's second tier: which memory of an ordinary prompt the folder has, and which it lacks.

Keys are the `content` of a memory of that text, not vLLM's hashes of blocks, which depend on its version and options.
So a prompt also goes on from the page of a memory that it begins with. Looking up takes one question to the file system
a segment, which a thread asks while the request waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from vllm.logger import init_logger

from vllm_armt.core import Segmentation
from vllm_armt.memories.errors import MemoriesError
from vllm_armt.memories.manifest import chain, root
from vllm_armt.memories.store import Store
from vllm_armt.memories.transfers import Folder

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class Prefix:
    """What is known of a prompt.

    Attributes:
        segments: after so many there is a memory in the folder; 0 for none.
        key, folder: of that.
        lacking: by segment, the keys of memories that the folder should have when the prompt has been read.
    """

    segments: int
    key: str
    folder: Folder
    lacking: dict[int, str]


class PrefixTier:
    """Of one store.

    Args:
        store: with the folder.
        segment_size: S.
    """

    def __init__(self, store: Store, segment_size: int) -> None:
        self._store, self._segment_size = store, segment_size
        self._threads = ThreadPoolExecutor(2, "memories-look-up")

    def look_up(self, ids: Sequence[int], salt: str | None, segmentation: Segmentation) -> Future[Prefix]:
        """Look up a prompt of a tenant, in a thread."""
        return self._threads.submit(self._look_up, ids, salt, segmentation)

    def shutdown(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _look_up(self, ids: Sequence[int], salt: str | None, segmentation: Segmentation) -> Prefix:
        try:
            return self._ask(ids, salt, segmentation)
        except MemoriesError as error:
            # a prompt needs no tier
            logger.warning("The prefix of a prompt could not be looked up. %s", error)
            return Prefix(0, "", "prefix", {})

    def _ask(self, ids: Sequence[int], salt: str | None, segmentation: Segmentation) -> Prefix:
        S, keys = self._segment_size, [root(salt) or ""]
        closed = segmentation.closed_tokens(len(ids)) // S
        for segment in range(closed):
            keys.append(chain(keys[-1] or None, ids[segment * S : (segment + 1) * S]))
        # the prompt asked once more has to compute its last token: one of whole segments needs the memory before
        usable = segmentation.closed_tokens(len(ids) - 1) // S
        kept = {*range(usable, closed + 1)} - {0}
        folders: tuple[tuple[Folder, object], ...] = (("prefix", self._store.prefix), ("pages", self._store.pages))
        lacking = {segment: keys[segment] for segment in kept if keys[segment] not in self._store.prefix}
        for segment in range(usable, 0, -1):
            for folder, pages in folders:
                if keys[segment] in pages:  # type: ignore[operator]
                    return Prefix(segment, keys[segment], folder, lacking)
        return Prefix(0, "", "prefix", lacking)

"""Which pages are kept, when, and of which requests it is not known yet what became of them.

A prompt's page is copied out in the step that reads the prompt's end, as later steps give it away. That of an answer is
known when the answer ends, which frees it; it is copied out before the next step writes to anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import RequestStatus

from vllm_armt.core import Segmentation
from vllm_armt.memories.manifest import Boundary, Manifest
from vllm_armt.memories.session import Session
from vllm_armt.memories.transfers import Failure, Report, Save, SavedPrefix, SavedText, Transfers

WRITE_BYTES = 1 << 30
"""Of pages on the host that wait to be written; beyond it no request starts that saves, and no prefix is kept."""


class Saves:
    """Of one engine.

    Args:
        segmentation_of: where the segments of a prompt of so many tokens lie.
        segment_size: S.
        page_bytes: of a page, all layers.
        block_ids: the block table of the request with this id.
    """

    def __init__(
        self,
        segmentation_of: Callable[[int], Segmentation],
        segment_size: int,
        page_bytes: int,
        block_ids: Callable[[str], Sequence[int]],
    ) -> None:
        self._segmentation_of, self._segment_size = segmentation_of, segment_size
        self._page_bytes, self._block_ids = page_bytes, block_ids
        self._tickets = count(1)
        self._unread: dict[str, Session] = {}
        self._writing: dict[int, Session] = {}
        self._of_ended: list[Save] = []

    @property
    def are_too_many(self) -> bool:
        """Whether the disk is so far behind that nothing more should be saved now."""
        return len(self._writing) * self._page_bytes >= WRITE_BYTES

    @property
    def are_waited_for(self) -> bool:
        """Whether steps are needed although no request is left to be computed."""
        return bool(self._of_ended) or any(session.args is not None for session in self._writing.values())

    def expect(self, session: Session) -> None:
        """Keep what a request's prompt leaves, once it is read."""
        self._unread[session.request.request_id] = session

    def forget(self, session: Session) -> None:
        """A request has ended; of a prompt that was not read to its end nothing is kept."""
        self._unread.pop(session.request.request_id, None)

    def fill(self, transfers: Transfers, output: SchedulerOutput) -> None:
        """Hand over what a step has to copy out."""
        transfers.saves_before, self._of_ended = self._of_ended, []
        for request_id in self._unread.keys() & output.num_scheduled_tokens.keys():
            request = self._unread[request_id].request
            if request.num_computed_tokens + output.num_scheduled_tokens[request_id] >= request.num_prompt_tokens:
                transfers.saves_after += self._of_prompt(self._unread.pop(request_id))

    def save_answer(self, session: Session) -> None:
        """Save all that a request, which ends now, has read and written. Its last token is not computed."""
        request, args = session.request, session.args
        assert args is not None
        assert args.save_memory is not None
        left_out = request.status == RequestStatus.FINISHED_STOPPED and not args.save_memory.include_stop_token
        ids = request._all_token_ids[: request.num_tokens - left_out]
        self._of_ended.append(self._of_text(session, ids, request.num_tokens - 1))

    def receive(self, report: Report) -> Iterator[tuple[Session, Manifest | Boundary | Failure | None]]:
        """The sessions whose saves the workers have done, each with what became of it."""
        for ticket, result in report.saved.items():
            yield self._writing.pop(ticket), result

    def _of_prompt(self, session: Session) -> list[Save]:
        request = session.request
        if session.args is not None:
            assert request.prompt_token_ids is not None
            return [self._of_text(session, request.prompt_token_ids, request.num_prompt_tokens)]
        assert session.prefix is not None
        if not session.prefix.done() or self.are_too_many:
            return []
        blocks = self._block_ids(request.request_id)
        return [
            self._save(session, blocks[segment - 1], SavedPrefix(key))
            for segment, key in session.prefix.result().lacking.items()
        ]

    def _of_text(self, session: Session, ids: Sequence[int], computed: int) -> Save:
        """The save of a text of which so many tokens are computed."""
        request, args = session.request, session.args
        assert args is not None
        options = None
        if args.save_memory is not None:
            options = {"parent": session.memory, "salt": session.salt} | args.save_memory.options
        closed = self._segmentation_of(request.num_prompt_tokens).closed_tokens(computed)
        text = SavedText(session.start, np.array(ids, dtype=np.int32), closed, options)
        column = closed // self._segment_size - 1
        save = self._save(session, self._block_ids(request.request_id)[column] if text.has_page else None, text)
        session.ticket = save.ticket
        return save

    def _save(self, session: Session, block: int | None, what: SavedPrefix | SavedText) -> Save:
        assert block != 0, "the page after the last closed segment is retained"
        save = Save(next(self._tickets), block, what)
        self._writing[save.ticket] = session
        return save

"""Reading a text of any length into a memory, in pieces that fit `max_model_len`: for LLM() and for servers.

    reading = read(store, [ids], segment_size=S, max_model_len=8192, total=len(ids), name="war-and-peace")
    memory = read_with(llm, reading)                                  # LLM()
    memory = await read_async(engine_client, reading)                 # AsyncLLM and its clients: never blocks the loop

Each piece is a request that goes on from the piece before (`build_memory`) and leaves a checkpoint, so that other
servers see how far it is. If somebody else has moved the name on meanwhile, all is read again behind theirs, unless
`if_parent` was asked for; messages are rendered anew for that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack
from uuid import uuid4

from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind

from vllm_armt.memories.disk.builds import Build, Options
from vllm_armt.memories.disk.manifest import Boundary, Manifest
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.errors import Conflict, InvalidInput, MemoriesError
from vllm_armt.memories.texts import Tokens

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

PIECE_TOKENS = 1 << 17
"""Of a piece, where `max_model_len` allows more: after each the state is saved."""
FIRST_PIECE_TOKENS = 1 << 13
PIECE_SECONDS = 2.0
"""Pieces grow while they take less, so that who watches sees how far it is, whatever the engine reads in a second."""

Behind = Callable[[Manifest | None], tuple[Tokens, tuple[str, ...]]]
"""Gives messages as they are written behind a memory: their ids, and the roles of all messages that are then read."""


@dataclass(frozen=True)
class Piece:
    """A request to be run, whose output is sent to the generator that gave it."""

    prompt: TokensPrompt
    params: SamplingParams


Reading = Generator[Piece, RequestOutput, Manifest]


def read(
    store: Store,
    tokens: Iterable[Sequence[int]],
    *,
    segment_size: int,
    max_model_len: int,
    piece_tokens: int | None = None,
    total: int = 0,
    begun: Callable[[Manifest], object] | None = None,
    behind: Behind | None = None,
    **options: Unpack[Options],
) -> Reading:
    """Read a text; gives requests and wants their outputs, and returns the memory.

    It asks the disk and `tokens`, so an event loop advances it in a thread. A generator that is closed or that an
    exception is thrown into leaves the memory as failed.

    Args:
        store: of the engine's model.
        tokens: ids of the text in parts of any length, which may be made as they are wanted; iterated once more if the
            text has to be read again.
        segment_size: S.
        max_model_len: of the engine.
        piece_tokens: of a piece; None: as many as the engine reads in some seconds, up to `PIECE_TOKENS`.
        total: tokens of the text, as far as is known; for those who watch.
        begun: is given the memory as soon as it is there, in progress.
        behind: gives what is read behind another memory than `options["parent"]`; None: `tokens` again.
        options: of the memory.

    Raises:
        InvalidInput: the text is empty, or `max_model_len` has no room for two segments and a token.
        MemoriesError: the memory can't be begun, a piece can't be read, or the memory can't be completed.
    """
    with store.begin(total, **options) as build:
        if begun is not None:
            begun(build.manifest)
        fields: dict[str, Any] = {}
        try:
            while True:
                # before a piece stand the last closed segment and what is pending, and its request generates a token
                most = max_model_len - segment_size - max(segment_size, len(build.manifest.pending)) - 1
                if most < 1:
                    raise InvalidInput(
                        f"max_model_len is {max_model_len}, which leaves no room for a token to be read behind a "
                        f"segment of {segment_size} and {max_model_len - segment_size - 1 - most} tokens after it."
                    )
                if piece_tokens is not None:
                    pace = _Pace(min(most, piece_tokens), min(most, piece_tokens))
                else:
                    pace = _Pace(min(most, FIRST_PIECE_TOKENS), min(most, PIECE_TOKENS))
                boundary = yield from _read_pieces(build, tokens, pace, total, options.get("salt"))
                try:
                    return build.complete(boundary, **fields)
                except Conflict:
                    if options.get("if_parent") is not None or build.manifest.inherits is None:
                        raise
                    parent = build.rebase()
                    if behind is not None:
                        tokens, fields["roles"] = behind(parent)
        except GeneratorExit:
            build.fail("It was cancelled.")
            raise


def read_with(llm: LLM, reading: Reading) -> Manifest:
    """Run a reading on an engine of this process, and wait for it.

    Raises:
        MemoriesError: as `read`.
    """
    try:
        piece = next(reading)
        while True:
            (output,) = llm.generate(piece.prompt, piece.params, use_tqdm=False)
            piece = reading.send(output)
    except StopIteration as stop:
        return stop.value
    finally:
        reading.close()


async def read_async(client: EngineClient, reading: Reading) -> Manifest:
    """Run a reading on an engine that serves others meanwhile. Cancelled, it leaves the memory as failed.

    Raises:
        MemoriesError: as `read`.
    """
    output: RequestOutput | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(_advance, reading, output))
            try:
                piece = await asyncio.shield(step)
            finally:
                # the generator can't be closed while it runs
                await asyncio.wait([step])
            if isinstance(piece, Manifest):
                return piece
            request_id = f"memory-{uuid4().hex}"
            # of FINAL_ONLY there is one
            output = [output async for output in client.generate(piece.prompt, piece.params, request_id)][-1]
    except Exception as error:
        with suppress(type(error), StopIteration):
            await asyncio.to_thread(reading.throw, error)
        raise
    finally:
        await asyncio.to_thread(reading.close)


def _advance(reading: Reading, output: RequestOutput | None) -> Piece | Manifest:
    try:
        return next(reading) if output is None else reading.send(output)
    except StopIteration as stop:
        return stop.value


def _read_pieces(
    build: Build, tokens: Iterable[Sequence[int]], pace: _Pace, total: int, salt: str | None
) -> Generator[Piece, RequestOutput, Boundary]:
    boundary, num_read = None, 0
    params = SamplingParams(
        max_tokens=1,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"build_memory": build.id},
    )
    for ids in _regrouped(tokens, pace):
        prompt = TokensPrompt(prompt_token_ids=ids)
        if salt is not None:
            prompt["cache_salt"] = salt
        begin = time.monotonic()
        boundary = _boundary_of((yield Piece(prompt, params)))
        pace.note(time.monotonic() - begin)
        build.checkpoint(boundary)
        num_read += len(ids)
        build.progress(num_read, max(total, num_read))
    if boundary is None:
        raise InvalidInput("The text is empty: give at least one token.")
    return boundary


@dataclass
class _Pace:
    """How many tokens the next piece has."""

    tokens: int
    most: int

    def note(self, seconds: float) -> None:
        """The piece before took so long."""
        if seconds < PIECE_SECONDS:
            self.tokens = min(2 * self.tokens, self.most)


def _regrouped(tokens: Iterable[Sequence[int]], pace: _Pace) -> Iterator[list[int]]:
    """The same tokens in parts of `pace.tokens`, the last one shorter."""
    part: list[int] = []
    for ids in tokens:
        begin = 0
        while begin < len(ids):
            end = begin + pace.tokens - len(part)
            part += ids[begin:end]
            begin = end
            if len(part) >= pace.tokens:
                yield part
                part = []
    if part:
        yield part


def _boundary_of(output: RequestOutput) -> Boundary:
    """Where the text ends that a piece's request has read."""
    answer: dict[str, Any] = (output.kv_transfer_params or {}).get("memory", {})
    saved = answer.get("saved", answer)
    if "boundary" in saved:
        return Boundary.model_validate_json(saved["boundary"])
    ended = output.outputs[0].finish_reason
    error = MemoriesError(saved.get("error", f"The engine ended the request without a memory ({ended})."))
    error.status = saved.get("status", 500)
    raise error

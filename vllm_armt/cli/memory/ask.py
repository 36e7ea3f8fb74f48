"""`vllm-armt memory ask`: questions to what a memory has read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_armt.cli.memory import options

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_armt.memories.disk.manifest import Manifest

Questions = Annotated[list[str], typer.Argument(metavar="QUESTION...", help="Each is asked by itself.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: the likeliest tokens.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Go on from the text as it is, also where the tokenizer has a chat template.")
]


def ask(
    directory: options.Directory,
    memory: options.Reference,
    questions: Questions,
    memories: options.Folder,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    raw: Raw = False,
    dtype: options.ServedDtype = "auto",
    engine: options.Engine = "{}",
    cache_salt: options.Salt = None,
    as_json: options.AsJson = False,
) -> None:
    """Ask a memory. Where the tokenizer has a chat template a question is a user's message, else it is plain text.

    Plain text follows what was read as it is given: a model of plain text may want a space before the question.
    """
    from vllm_armt.cli.memory.engine import engine as started
    from vllm_armt.cli.memory.tables import print_json

    with started(directory, memories, dtype, None, engine) as llm:
        answers = _answers(llm, memory, questions, max_tokens, temperature, raw, cache_salt)
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        print(answer["text"].strip())


def _answers(
    llm: LLM,
    reference: str,
    questions: Sequence[str],
    max_tokens: int,
    temperature: float,
    raw: bool,
    salt: str | None,
) -> list[dict[str, Any]]:
    """What came of each question, and by which memory.

    Raises:
        MemoriesError: the memory can't be used for it.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    from vllm_armt.memories.errors import MemoriesError
    from vllm_armt.memories.identity import open_store

    found = open_store(llm.llm_engine.vllm_config).get(reference, salt=salt)
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, extra_args={"memory": found.id})
    answers = []
    for question in questions:
        text = question if raw or not tokenizer.chat_template else _behind(tokenizer, found, question)
        prompt = TokensPrompt(prompt_token_ids=tokenizer.encode(text, add_special_tokens=False))
        if salt is not None:
            prompt["cache_salt"] = salt
        begun = time.perf_counter()
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        (answer,) = output.outputs
        told = (output.kv_transfer_params or {}).get("memory", {})
        if "used" not in told:
            raise MemoriesError(told.get("error", f"The engine did not use the memory ({answer.finish_reason})."))
        answers.append(
            {
                "question": question,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "seconds": round(seconds, 4),
                "memory": told["used"],
                "usage": {"prompt_tokens": len(prompt["prompt_token_ids"]), "completion_tokens": len(answer.token_ids)},
            }
        )
    return answers


def _behind(tokenizer: Any, memory: Manifest, question: str) -> str:
    """A question as the chat template writes it behind a memory, as the server does."""
    from vllm_armt.memories.chat import Outline, continuation

    async def render(messages: Sequence[dict[str, Any]], *, generate: bool, tools: bool = True) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    message = {"role": "user", "content": question}
    return asyncio.run(continuation(render, Outline.of(memory.roles), [message], None, generate=True))

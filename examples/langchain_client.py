"""LangChain on a server of an ARMT: a question, perhaps to a memory, and what of it was not read again.

pip install langchain-openai
python -m examples.langchain_client --model my-armt:war-and-peace "Who is Natasha?"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from langchain_core.messages import BaseMessageChunk, HumanMessage
from langchain_openai import ChatOpenAI


def chat_model(url: str, model: str, max_tokens: int) -> ChatOpenAI:
    """A chat model of LangChain's; it goes wherever LangChain takes one.

    Args:
        url: of the server.
        model: as it is served, or `MODEL:NAME` for what a memory has read.
        max_tokens: of an answer.
    """
    return ChatOpenAI(
        model=model,
        base_url=f"{url}/v1",
        api_key="none",  # type: ignore[arg-type]
        temperature=0,
        max_tokens=max_tokens,  # type: ignore[call-arg]
        stream_usage=True,
        # a request that failed once fails again
        max_retries=0,
    )


def ask(model: ChatOpenAI, question: str) -> Iterator[str]:
    """Stream an answer, and give its counts last, in a line of their own."""
    answer: BaseMessageChunk | None = None
    for part in model.stream([HumanMessage(question)]):
        yield str(part.content)
        answer = part if answer is None else answer + part  # type: ignore[assignment]
    usage = getattr(answer, "usage_metadata", None) or {}
    known = usage.get("input_token_details", {}).get("cache_read", 0)
    yield f"\n[{usage['input_tokens']} tokens sent, {known} not read again, {usage['output_tokens']} generated]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    for text in ask(chat_model(given.url, given.model, given.max_tokens), given.question):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()

"""LlamaIndex on a server of an ARMT: the whole document goes to the model, with no index of pieces before it.

    pip install llama-index-llms-openai-like
    python -m examples.llamaindex_client --model my-armt --document book.txt "Who is Natasha?"

A second question about the same document is answered from the prefix cache: only the question is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def language_model(url: str, model: str, max_tokens: int, context_window: int = 1_048_576) -> OpenAILike:
    """A language model of LlamaIndex's; it goes wherever LlamaIndex takes one.

    Args:
        url: of the server.
        model: as it is served, or `MODEL:NAME` for what a memory has read.
        max_tokens: of an answer.
        context_window: the server's --max-model-len, in tokens; LlamaIndex cuts texts that are longer.
    """
    return OpenAILike(
        model=model,
        api_base=f"{url}/v1",
        api_key="none",
        is_chat_model=True,
        context_window=context_window,
        temperature=0,
        max_tokens=max_tokens,
        # a request that failed once fails again
        max_retries=0,
    )


def ask(model: OpenAILike, question: str, document: str = "") -> Iterator[str]:
    """Stream an answer to a question about a document, which comes first: what texts begin with is read once."""
    said = [ChatMessage(role="system", content=document)] if document else []
    for part in model.stream_chat([*said, ChatMessage(role="user", content=question)]):
        yield part.delta or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--document", type=Path)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    document = given.document.read_text() if given.document else ""
    for text in ask(language_model(given.url, given.model, given.max_tokens), given.question, document):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()

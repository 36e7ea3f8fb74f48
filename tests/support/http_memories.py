"""Memories of a server, as its clients see them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.support.tiny_checkpoint import MODEL, options

TOLERANCE = 1e-4
"""Of log-probabilities behind a memory, by those behind its text."""


class Memories:
    """Requests to `/v1/memories`; each gives the JSON of its answer, whose status is as expected."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def call(self, method: str, path: str, status: int = 200, **request: Any) -> Any:
        response = self.http.request(method, f"/v1/memories{path}", **request)
        assert response.status_code == status, response.text
        return response.json()

    def read(self, text: Any, name: str | None = None, **fields: Any) -> Any:
        """A memory that is complete."""
        body = {"input": text} | ({"name": name} if name else {}) | fields
        memory = self.call("POST", "", json=body, params={"wait": True})
        assert memory["status"] == "completed"
        return memory

    def append(self, memory: str, text: Any, status: int = 200, **fields: Any) -> Any:
        return self.call("POST", f"/{memory}/append", status, json={"input": text} | fields, params={"wait": True})

    def get(self, memory: str, status: int = 200, **params: Any) -> Any:
        return self.call("GET", f"/{memory}", status, params=params)

    def list(self, **params: Any) -> Any:
        return self.call("GET", "", params=params)

    def delete(self, memory: str, status: int = 200, **params: Any) -> Any:
        return self.call("DELETE", f"/{memory}", status, params=params)

    def delete_all(self, **params: Any) -> None:
        while found := self.list(limit=100, **params)["data"]:
            for memory in found:
                self.delete(memory["id"], **params)


def complete(client: OpenAI, prompt: Any, memory: str | None = None, max_tokens: int = 20, **request: Any) -> Any:
    """A greedy completion, perhaps behind a memory, with the log-probabilities of its tokens."""
    extra = options(return_token_ids=True) | request.pop("extra_body", {})
    model = MODEL if memory is None else f"{MODEL}:{memory}"
    defaults = {"max_tokens": max_tokens, "temperature": 0, "logprobs": 5}
    return client.completions.create(model=model, prompt=prompt, extra_body=extra, **defaults | request)


def chat(client: OpenAI, messages: list[Any], memory: str | None = None, **request: Any) -> Any:
    """A greedy answer of 20 tokens, perhaps behind a memory."""
    extra = options(return_token_ids=True) | request.pop("extra_body", {})
    model = MODEL if memory is None else f"{MODEL}:{memory}"
    defaults: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    return client.chat.completions.create(model=model, messages=messages, extra_body=extra, **defaults | request)


def probabilities(completion: Any) -> list[float]:
    """Of the tokens of a completion."""
    return completion.choices[0].logprobs.token_logprobs


def is_same(answer: Any, expected: Any) -> bool:
    """Whether a chat's answer has the tokens of another, as likely as there."""
    (one,), (other,) = answer.choices, expected.choices
    probabilities = [[token.logprob for token in choice.logprobs.content] for choice in (one, other)]
    return one.token_ids == other.token_ids and probabilities[0] == pytest.approx(probabilities[1], abs=TOLERANCE)


def of_memory(response: Any) -> Any:
    """What a response says of memories."""
    return response.kv_transfer_params["memory"]

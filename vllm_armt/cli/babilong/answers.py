"""Who answers: an engine in this process, or a server that speaks OpenAI's API."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_armt.cli.bench.engines import ENVIRONMENT

if TYPE_CHECKING:
    from vllm_armt.babilong import Sample


class Answers(Protocol):
    """Who can be asked."""

    def __call__(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, str]]:
        """Ask these together; each with what was written, in the order in which answers come."""


class Engine:
    """vLLM in this process.

    Args:
        model: directory of the checkpoint.
        longest: tokens of the longest prompt.
        max_tokens: of an answer.
        dtype: of the model.
        options: further arguments of `vllm.LLM`, which win.
    """

    def __init__(self, model: str, longest: int, max_tokens: int, dtype: str, options: dict[str, Any]) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams

        self.sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        self.llm = LLM(model, **{"dtype": dtype, "max_model_len": longest + max_tokens} | options)

    def __call__(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, str]]:
        prompts: Any = [{"prompt_token_ids": sample.ids.tolist()} for sample in samples]
        outputs = self.llm.generate(prompts, self.sampling, use_tqdm=False)
        for sample, output in zip(samples, outputs, strict=True):
            yield sample, output.outputs[0].text


class Server:
    """A server with OpenAI's completions API that takes prompts as tokens, as vLLM's does.

    Args:
        url: with or without `/v1`.
        model: its name there; None for the first.
        tokenizer: of the model; None for the directory that the server says it serves.
        max_tokens: of an answer.

    Attributes:
        directory: what it serves; None if that is not on this machine.
        tokenizer: name or directory.

    Raises:
        ValueError: openai is not installed, or it cannot be told which tokenizer the model has.
    """

    def __init__(self, url: str, model: str | None, tokenizer: str | None, max_tokens: int) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ValueError("Asking a server needs openai: pip install 'vllm-armt[evaluate]'.") from error

        key = os.environ.get("OPENAI_API_KEY", "none")
        # a prompt of a million tokens takes its time
        self.client = OpenAI(base_url=url.rstrip("/").removesuffix("/v1") + "/v1", api_key=key, timeout=24 * 3600)
        served = list(self.client.models.list())
        card = next((card for card in served if card.id == model), None) if model else served[0]
        if card is None:
            raise ValueError(f"{url} serves no {model!r}; it has {', '.join(card.id for card in served)}.")
        self.model = card.id
        self.max_tokens = max_tokens
        root = getattr(card, "root", None)
        self.directory = Path(root) if root and Path(root).is_dir() else None
        if tokenizer is None and self.directory is None:
            raise ValueError(f"{url} does not say where the tokenizer of {card.id!r} is: name its --tokenizer.")
        self.tokenizer = tokenizer or str(self.directory)

    def __call__(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, str]]:
        with ThreadPoolExecutor(len(samples)) as pool:
            asked = {pool.submit(self._ask, sample): sample for sample in samples}
            for future in as_completed(asked):
                yield asked[future], future.result()

    def _ask(self, sample: Sample) -> str:
        completion = self.client.completions.create(
            model=self.model, prompt=sample.ids.tolist(), max_tokens=self.max_tokens, temperature=0
        )
        return completion.choices[0].text

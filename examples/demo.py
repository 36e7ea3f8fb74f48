"""Serves an ARMT end to end and has it read a document of a hundred segments.

Makes SmolLM2-135M-Instruct and a fresh ARMT of it (or takes `--model`), starts `vllm serve`, streams a chat answer,
sends the document with a question at its end, and reports times and the memory that the request held. Run as
`python -m examples.demo`; fails if the server does, if an answer is empty, or if memory is not bounded.
"""

import argparse
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from examples.server import serve
from examples.shakespeare import document
from examples.smollm2 import MODELS, QUESTION, make_smollm2
from vllm_armt.hf import ARMTConfig

LOG = MODELS / "demo-server.log"
MAX_PAGES = 5
"""Pages a layer that a request of any length may hold: a step reads one and writes two, and where steps overlap
(asynchronous scheduling, CUDA) the next one has written two more."""
DOCUMENT_QUESTION = "\n\nQuestion: In which castle does the play of Hamlet, Prince of Denmark, begin?\nAnswer:"


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    model = args.model or make_demo_model(args.segment_size, args.num_mem_tokens, args.d_mem)
    config = ARMTConfig.from_pretrained(model)
    length = args.segments * config.segment_size
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = document(tokenizer, length) + tokenizer(DOCUMENT_QUESTION, add_special_tokens=False).input_ids

    pool = int(args.pool * 2**30)
    print(f"starting vllm serve {model} (log: {LOG})", flush=True)
    with serve(model, ["--kv-cache-memory-bytes", str(pool), *args.serve], log=LOG) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=args.timeout)
        options: dict[str, Any] = {
            "model": client.models.list().data[0].id,
            "max_tokens": args.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        print(f"\nQ: {QUESTION}\nA: ", end="", flush=True)
        chat = client.chat.completions.create(messages=[{"role": "user", "content": QUESTION}], **options)
        Answer.receive(chat, lambda choice: choice.delta.content)

        print(f"\nreading {length:,} tokens of Shakespeare ({args.segments} segments), then{DOCUMENT_QUESTION}", end="")
        with PoolMeter(url) as meter:
            completion = client.completions.create(prompt=prompt, **options)
            answer = Answer.receive(completion, lambda choice: choice.text)
        report(answer, meter, pool, config)
    if args.model is None:
        print(
            "\nThe memory of this ARMT is fresh, that is untrained: the run shows how such a model is served, in which"
            "\ntime and memory. It does not show recall; for that, serve a trained checkpoint with --model."
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an ARMT checkpoint of your own, instead of a fresh one of SmolLM2")
    parser.add_argument("--segments", type=int, default=100, help="length of the document (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of an answer (default: %(default)s)")
    parser.add_argument("--pool", type=float, default=1.0, help="vLLM's memory pool in GiB (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one request (default: %(default)s)")
    fresh = parser.add_argument_group("the fresh ARMT")
    fresh.add_argument("--segment-size", type=int, default=512, help="S, tokens a segment (default: %(default)s)")
    fresh.add_argument("--num-mem-tokens", type=int, default=16, help="m, memory tokens (default: %(default)s)")
    fresh.add_argument("--d-mem", type=int, default=64, help="width of the memory's keys (default: %(default)s)")
    parser.add_argument("serve", nargs="*", help="flags for vllm serve, after --")
    return parser.parse_args()


def make_demo_model(segment_size: int, num_mem_tokens: int, d_mem: int) -> Path:
    """Return a directory with an ARMT around SmolLM2 whose memory is untrained."""
    model = MODELS / f"SmolLM2-135M-ARMT-{segment_size}-{num_mem_tokens}-{d_mem}"
    if not model.exists():
        sizes = ["--segment-size", segment_size, "--num-mem-tokens", num_mem_tokens, "--d-mem", d_mem]
        vllm_armt = Path(sys.executable).with_name("vllm-armt")
        subprocess.run([vllm_armt, "init", make_smollm2(), model, *map(str, sizes)], check=True)
    return model


@dataclass
class Answer:
    """A streamed answer, printed as it came, with its times in seconds and its usage in tokens."""

    to_first_token: float
    decoding: float
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def receive(cls, stream: Iterable, text_of: Callable[[Any], str | None]) -> "Answer":
        """Print a stream of the `openai` client's while it arrives.

        Args:
            stream: as returned by `create(stream=True)`, asked to include usage.
            text_of: the text in a choice of one of its events.

        Raises:
            RuntimeError: the answer holds no text.
        """
        start, first, text, usage = time.monotonic(), None, "", None
        for event in stream:
            usage = event.usage or usage
            for piece in filter(None, map(text_of, event.choices)):
                first = first or time.monotonic()
                text += piece
                print(piece, end="", flush=True)
        print()
        if not text.strip() or first is None or usage is None:
            raise RuntimeError(f"The answer is empty: {text!r}, usage {usage}.")
        return cls(first - start, time.monotonic() - first, usage.prompt_tokens, usage.completion_tokens)


class PoolMeter:
    """Watches, from `/metrics`, how many blocks of vLLM's pool are held while a request runs.

    A block is one page of every layer.
    """

    def __init__(self, url: str, interval: float = 0.1) -> None:
        self.url = f"{url}/metrics"
        self.interval = interval
        self.blocks = int(self._sample("vllm:cache_config_info").labels["num_gpu_blocks"])
        self.most_held = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PoolMeter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            # vLLM leaves its null block out of this share
            held = round(self._sample("vllm:kv_cache_usage_perc").value * (self.blocks - 1))
            self.most_held = max(self.most_held, held)

    def _sample(self, name: str):
        with urllib.request.urlopen(self.url, timeout=30) as response:
            families = text_string_to_metric_families(response.read().decode())
        return next(sample for family in families for sample in family.samples if sample.name == name)


def report(answer: Answer, meter: PoolMeter, pool: int, config: ARMTConfig) -> None:
    """Print what the document's request took.

    Raises:
        RuntimeError: it held more memory than its length allows, or the memory could not be seen.
    """
    base = config.base_model_config
    head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    itemsize = getattr(torch, str(config.model_dtype)).itemsize
    kv_of_a_token = 2 * base.num_hidden_layers * base.num_key_value_heads * head_dim * itemsize
    kv = kv_of_a_token * (answer.prompt_tokens + answer.completion_tokens)
    held = meter.most_held * pool / meter.blocks
    prefill, decode = answer.prompt_tokens / answer.to_first_token, (answer.completion_tokens - 1) / answer.decoding
    print(f"""
  read                  {answer.prompt_tokens:,} tokens, {prefill:,.0f} tokens/s
  time to first token   {answer.to_first_token:.1f} s
  wrote                 {answer.completion_tokens} tokens, {decode:.1f} tokens/s
  memory held           {held / 1e6:,.1f} MB at most ({meter.most_held} pages a layer)
  a KV cache instead    {kv / 1e6:,.1f} MB for the same tokens in the base model""")
    if not 0 < meter.most_held <= MAX_PAGES:
        raise RuntimeError(
            f"The request held {meter.most_held} pages a layer; at least 1 and at most {MAX_PAGES} were expected."
        )


if __name__ == "__main__":
    main()

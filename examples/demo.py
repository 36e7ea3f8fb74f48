"""Reads a document of more than 100,000 tokens with a small ARMT, keeps what it has read, and asks another server.

The model is the one in `examples/models` (or `--model`); the document is real text with a story hidden in it. A server
reads it into a memory and is stopped. A second one, which has never seen the document, is asked over the OpenAI API for
the people of the story, with the question alone; each answer is printed beside the truth with how long ago it was told,
and the time to the first token beside the time that reading took. Run as `python -m examples.demo`; fails if an answer
is wrong or if what requests hold is not bounded.
"""

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from examples.background import fetch
from examples.packages import MODELS
from examples.server import serve
from examples.story import StoryDocument, hide_story
from vllm_armt.babilong import Background, Encoder, is_right, task_named
from vllm_armt.cli.bench.shapes import Model, of_checkpoint

SHIPPED = Path(__file__).parent / "models" / "ARMT-1M-qa1"
LOG = MODELS / "demo-server.log"
NAME = "story"
"""Of the memory."""
MAX_PAGES = 5
"""Pages a layer that a request of any length may hold: a step reads one and writes two, and where steps overlap
(asynchronous scheduling, CUDA) the next one has written two more."""


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    model = of_checkpoint(args.model, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model, config=model.config)
    background = Background.of_directory(fetch() / "test", tokenizer, "collapsed")
    document = hide_story(tokenizer, background, args.tokens, args.facts, args.seed)
    show(document, tokenizer)

    pool = int(args.pool * 2**30)
    flags = ["--dtype", args.dtype, "--kv-cache-memory-bytes", str(pool), *args.serve]
    with tempfile.TemporaryDirectory(dir=MODELS, prefix=".demo-memories-") as memories:

        @contextmanager
        def server() -> Iterator[tuple[OpenAI, PoolMeter]]:
            print(f"starting vllm-armt serve {args.model} --memories {memories} (log: {LOG})", flush=True)
            words = ["--memories", memories, *flags]
            with (
                serve(args.model, words, log=LOG, command="vllm-armt") as url,
                OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=args.timeout) as client,
                PoolMeter(url) as meter,
            ):
                yield client, meter

        with server() as (client, reading):
            read = read_into_memory(client, document)
            print(
                f"read it in {read.seconds:.1f} s; now this server is stopped, and the document forgotten", flush=True
            )
        with server() as (client, asking):
            answers = [ask(client, document, question, tokenizer) for question in range(len(document.questions))]
    report(document, read, answers, max(reading, asking, key=lambda meter: meter.most_held), pool, model)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="an ARMT trained on qa1 (default: the shipped one)")
    parser.add_argument("--tokens", type=int, default=120_000, help="length of the document (default: %(default)s)")
    parser.add_argument("--facts", type=int, default=12, help="of the story (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the story and the text (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="that the model computes in (default: %(default)s)")
    parser.add_argument("--pool", type=float, default=1.0, help="vLLM's memory pool in GiB (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one request (default: %(default)s)")
    parser.add_argument("serve", nargs="*", help="flags for vllm serve, after --")
    return parser.parse_args()


def show(document: StoryDocument, tokenizer, around: int = 12) -> None:
    """Print every fact with the text around it."""
    print(f"\nA document of {len(document.ids):,} tokens, with {len(document.facts)} facts hidden in it:\n")
    for fact, start in zip(document.facts, document.starts, strict=True):
        before, after = document.ids[max(0, start - around) : start], document.ids[start : start + 2 * around]
        beyond = tokenizer.decode(after).strip().removeprefix(fact.text)
        print(f"{start:>9,}  …{' '.join(tokenizer.decode(before).split())} [{fact.text}] {' '.join(beyond.split())}…")
    print()


@dataclass
class Read:
    """A document that was read into a memory: after how many seconds, and the bytes of the memory."""

    seconds: float
    bytes: int


def read_into_memory(client: OpenAI, document: StoryDocument) -> Read:
    """Send the document once; the server answers when its memory is on the disk."""
    keep = {"vllm_xargs": {"save_memory": json.dumps({"name": NAME, "after": "prompt"})}}
    begun = time.monotonic()
    completion = client.completions.create(
        model=client.models.list().data[0].id, prompt=document.ids, max_tokens=1, extra_body=keep
    )
    seconds = time.monotonic() - begun
    assert completion.model_extra is not None
    return Read(seconds, completion.model_extra["kv_transfer_params"]["memory"]["saved"]["bytes"])


@dataclass
class Answer:
    """What the server wrote, the seconds to its first token, and how many tokens it was sent."""

    text: str
    seconds: float
    sent: int


def ask(client: OpenAI, document: StoryDocument, question: int, tokenizer) -> Answer:
    """Ask the memory of the document; of the document itself nothing is sent."""
    asked = Encoder(tokenizer).sentence(document.questions[question].text, asks=True).ids
    model = client.models.list().data[0].id
    begun, first, text = time.monotonic(), 0.0, ""
    stream = client.completions.create(
        model=model, prompt=asked, max_tokens=8, temperature=0, stream=True, extra_body={"vllm_xargs": {"memory": NAME}}
    )
    for part in stream:
        first = first or time.monotonic() - begun
        text += part.choices[0].text
    return Answer(text, first, len(asked))


class PoolMeter:
    """Watches, from `/metrics`, how many blocks of vLLM's pool are held while requests run.

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


def report(
    document: StoryDocument, read: Read, answers: list[Answer], meter: PoolMeter, pool: int, model: Model
) -> None:
    """Print the answers beside the truth, and what they took.

    Raises:
        SystemExit: an answer is wrong.
        RuntimeError: requests held more than they may, or what they held could not be seen.
    """
    table = Table("question", "answer", "truth", "told", "tokens ago", "first token, s")
    wrong = 0
    for question, answer in zip(document.questions, answers, strict=True):
        fact = question.supports[-1]
        right = is_right(task_named("qa1"), question, answer.text)
        wrong += not right
        told = document.facts[fact].text, f"{len(document.ids) - document.starts[fact]:,}"
        said = answer.text.strip() if right else f"[bold red]{answer.text.strip()}[/]"
        table.add_row(question.text, said, question.answer, *told, f"{answer.seconds:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)

    count = len(document.ids)
    slowest = max(answer.seconds for answer in answers)
    held = meter.most_held * pool / meter.blocks
    cache = model.kv_bytes_per_token * count
    print(f"""
  read once             {count:,} tokens in {read.seconds:.1f} s, {count / read.seconds:,.0f} tokens/s
  kept                  {read.bytes / 1e6:,.2f} MB on disk
  first token           by memory {slowest:.2f} s at most, {answers[0].sent} tokens sent; anew {read.seconds:.1f} s
  held by requests      {held / 1e6:,.2f} MB at most ({meter.most_held} pages a layer)
  a KV cache instead    {cache / 1e6:,.1f} MB for the same tokens in the base model""")
    if not 0 < meter.most_held <= MAX_PAGES:
        raise RuntimeError(
            f"The requests held {meter.most_held} pages a layer; at least 1 and at most {MAX_PAGES} were expected."
        )
    if wrong:
        sys.exit(f"{wrong} of {len(answers)} answers are wrong.")


if __name__ == "__main__":
    main()

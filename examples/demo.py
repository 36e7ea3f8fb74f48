"""Serves a small ARMT and asks it about a document of more than 100,000 tokens.

The model is the one in `examples/models` (or `--model`); the document is real text with a story hidden in it. The
people of the story are asked for over the OpenAI API, one after the other, and each answer is printed beside the
truth with how long ago it was told. The first question waits for the document to be read; the others find its memory
in vLLM's prefix cache. Run as `python -m examples.demo`; fails if an answer is wrong or if the memory of a request is
not bounded.
"""

import argparse
import signal
import sys
import threading
import time
import urllib.request
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
from vllm_armt.babilong import Background, is_right, task_named
from vllm_armt.cli.bench.shapes import of_checkpoint

SHIPPED = Path(__file__).parent / "models" / "ARMT-1M-qa1"
LOG = MODELS / "demo-server.log"
MAX_PAGES = 5
"""Pages a layer that a request of any length may hold: a step reads one and writes two, and where steps overlap
(asynchronous scheduling, CUDA) the next one has written two more."""


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    model = of_checkpoint(args.model, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model, config=model.config)
    background = Background.of_directory(fetch() / "test", tokenizer)
    document = hide_story(tokenizer, background, args.tokens, args.facts, args.seed)
    show(document, tokenizer)

    pool = int(args.pool * 2**30)
    print(f"starting vllm serve {args.model} (log: {LOG})", flush=True)
    with serve(args.model, ["--dtype", args.dtype, "--kv-cache-memory-bytes", str(pool), *args.serve], log=LOG) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=args.timeout)
        with PoolMeter(url) as meter:
            answers = [ask(client, document, question, tokenizer) for question in range(len(document.questions))]
    report(document, answers, meter, pool, model.kv_bytes_per_token)


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
        beyond = tokenizer.decode(after).removeprefix(f" {fact.text}")
        print(f"{start:>9,}  …{' '.join(tokenizer.decode(before).split())} [{fact.text}] {' '.join(beyond.split())}…")
    print()


@dataclass
class Answer:
    """What the server wrote, after how many seconds, and how many tokens it was of."""

    text: str
    seconds: float
    tokens: int


def ask(client: OpenAI, document: StoryDocument, question: int, tokenizer) -> Answer:
    """Ask a question behind the document."""
    asked = tokenizer(f" {document.questions[question].text}", add_special_tokens=False).input_ids
    model = client.models.list().data[0].id
    begun = time.monotonic()
    completion = client.completions.create(model=model, prompt=document.ids + asked, max_tokens=8, temperature=0)
    assert completion.usage is not None
    return Answer(completion.choices[0].text, time.monotonic() - begun, completion.usage.total_tokens)


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


def report(document: StoryDocument, answers: list[Answer], meter: PoolMeter, pool: int, kv: int) -> None:
    """Print the answers beside the truth, and what they took; `kv` are the bytes of a token's keys and values.

    Raises:
        SystemExit: an answer is wrong.
        RuntimeError: a request held more memory than its length allows, or the memory could not be seen.
    """
    table = Table("question", "answer", "truth", "told", "tokens ago", "seconds")
    wrong = 0
    for question, answer in zip(document.questions, answers, strict=True):
        fact = question.supports[-1]
        right = is_right(task_named("qa1"), question, answer.text)
        wrong += not right
        told = document.facts[fact].text, f"{len(document.ids) - document.starts[fact]:,}"
        said = answer.text.strip() if right else f"[bold red]{answer.text.strip()}[/]"
        table.add_row(question.text, said, question.answer, *told, f"{answer.seconds:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)

    first = answers[0]
    held = meter.most_held * pool / meter.blocks
    print(f"""
  read                  {first.tokens:,} tokens in {first.seconds:.1f} s, {first.tokens / first.seconds:,.0f} tokens/s
  further questions     {max((answer.seconds for answer in answers[1:]), default=0.0):.2f} s at most
  memory held           {held / 1e6:,.2f} MB at most ({meter.most_held} pages a layer)
  a KV cache instead    {kv * first.tokens / 1e6:,.1f} MB for the same tokens in the base model""")
    if not 0 < meter.most_held <= MAX_PAGES:
        raise RuntimeError(
            f"The requests held {meter.most_held} pages a layer; at least 1 and at most {MAX_PAGES} were expected."
        )
    if wrong:
        sys.exit(f"{wrong} of {len(answers)} answers are wrong.")


if __name__ == "__main__":
    main()

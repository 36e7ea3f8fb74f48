"""One server reads, another answers: prefill and decode apart, with nothing between them but a folder.

Both servers run with `--memories FOLDER,prefix`, so that the last memories of every prompt are kept by the hash of the
text. A prompt goes to the reader first, which reads it and generates one token; then to the answerer, which finds the
memory in the folder, reads what is left, less than two segments, and generates. So long texts never hold up those who
decode. The folder may be on a network file system, and there may be any number of servers of either kind.

Run as `python -m examples.disaggregated`; on one machine, with the shipped model. Fails if the answerer has read what
it should have found, or answers otherwise than the reader.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from transformers import AutoTokenizer

from examples.background import fetch
from examples.demo import SHIPPED
from examples.packages import MODELS
from examples.server import serve
from examples.story import hide_story
from vllm_armt.babilong import Background
from vllm_armt.cli.bench.shapes import of_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="an ARMT trained on qa1 (default: the shipped one)")
    parser.add_argument("--tokens", type=int, default=20_000, help="length of the document (default: %(default)s)")
    parser.add_argument("serve", nargs="*", help="flags for vllm serve, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    config = of_checkpoint(args.model, "bfloat16").config
    tokenizer = AutoTokenizer.from_pretrained(args.model, config=config)
    document = hide_story(tokenizer, Background.of_directory(fetch() / "test", tokenizer), args.tokens, facts=8, seed=1)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=MODELS, prefix=".disaggregated-"))
        reader, answerer = (
            stack.enter_context(connected(args.model, Path(folder), role, args.serve))
            for role in ("reader", "answerer")
        )
        for question in document.questions:
            asked = tokenizer(f" {question.text}", add_special_tokens=False).input_ids
            prefill, answer = answer_apart(reader, answerer, document.ids + asked, config.segment_size)
            print(
                f"{question.text} {answer.text.strip()}: the reader took {prefill.seconds:.2f} s, the answerer "
                f"{answer.seconds:.2f} s; it found {answer.cached:,} of {answer.sent:,} tokens"
            )


@contextmanager
def connected(model: Path, folder: Path, role: str, flags: list[str]) -> Iterator[OpenAI]:
    """A client of a server that keeps the memories of its prompts in the folder."""
    log = MODELS / f"disaggregated-{role}.log"
    print(f"starting the {role}: vllm-armt serve {model} --memories {folder},prefix (log: {log})", flush=True)
    words = ["--memories", f"{folder},prefix", "--kv-cache-memory-bytes", str(1 << 28), *flags]
    with (
        serve(model, words, log=log, command="vllm-armt") as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=1800) as client,
    ):
        yield client


@dataclass
class Completion:
    """What a server wrote, after how many seconds; the tokens that it was sent, and those that it did not read."""

    text: str
    seconds: float
    sent: int
    cached: int


def complete(client: OpenAI, prompt: list[int], max_tokens: int) -> Completion:
    model = client.models.list().data[0].id
    begun = time.monotonic()
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
    seconds = time.monotonic() - begun
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    cached = (details and details.cached_tokens) or 0
    return Completion(answer.choices[0].text, seconds, answer.usage.prompt_tokens, cached)


def answer_apart(
    reader: OpenAI, answerer: OpenAI, prompt: list[int], segment_size: int
) -> tuple[Completion, Completion]:
    """Let one server read a prompt and another answer it, with four tokens; both as they went.

    Raises:
        SystemExit: the answerer has read more than it must, or answers otherwise than the reader would.
    """
    prefill = complete(reader, prompt, max_tokens=1)
    answer = complete(answerer, prompt, max_tokens=4)
    alone = complete(reader, prompt, max_tokens=4)
    if answer.sent - answer.cached >= 2 * segment_size:
        sys.exit("The answerer has read what it should have found in the folder.")
    if answer.text != alone.text:
        sys.exit(f"The reader would have answered {alone.text!r}.")
    return prefill, answer


if __name__ == "__main__":
    main()

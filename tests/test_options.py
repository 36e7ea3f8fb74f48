"""Options of the plugin under `additional_config["armt"]`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_armt.options import ATTENTIONS, SCHEDULES, Options


def options(additional_config: Any) -> Options:
    return Options.of(SimpleNamespace(additional_config=additional_config))


@pytest.mark.parametrize("additional_config", [{}, None, {"armt": {}}, {"another plugin": {"schedule": "x"}}])
def test_without_options_everything_is_automatic(additional_config: Any):
    assert options(additional_config) == Options(schedule="auto", attention="auto")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_may_be_chosen(schedule: str):
    assert options({"armt": {"schedule": schedule}}).schedule == schedule


def test_a_schedule_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"\[\"schedule\"\] is 'fast'; allowed: 'auto', 'diagonal', 'sequential'\."):
        options({"armt": {"schedule": "fast"}})


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_attention_may_be_chosen(attention: str):
    assert options({"armt": {"attention": attention}}) == Options(schedule="auto", attention=attention)


@pytest.mark.parametrize("given", ["flashinfer", "SDPA", None, 1])
def test_an_attention_that_does_not_exist_is_refused_with_those_that_do(given: Any):
    message = rf"\[\"attention\"\] is {given!r}; allowed: 'auto', 'flash_attn', 'sdpa', 'vllm_cpu', 'xformers'\."
    with pytest.raises(ValueError, match=message):
        options({"armt": {"attention": given}})


def test_the_rows_that_fill_the_device_may_be_given():
    assert options({"armt": {"target_rows": 4096}}).target_rows == 4096


@pytest.mark.parametrize("given", [0, -1, 2.5, "many", True])
def test_rows_that_are_no_number_from_one_are_refused(given: Any):
    with pytest.raises(ValueError, match=r"\[\"target_rows\"\] is .*; it must be a whole number from 1\."):
        options({"armt": {"target_rows": given}})


def test_memories_are_kept_in_a_folder_and_perhaps_those_of_ordinary_prompts_too(tmp_path: Path):
    assert options({}).memories_directory is None
    kept = options({"armt": {"memories": f"{tmp_path}", "memories_max_bytes": 1 << 40}})
    assert (kept.memories_directory, kept.keeps_prefixes, kept.memories_max_bytes) == (tmp_path, False, 1 << 40)
    kept = options({"armt": {"memories": f"{tmp_path},prefix"}})
    assert (kept.memories_directory, kept.keeps_prefixes) == (tmp_path, True)
    assert options({"armt": {"memories": "~/memories"}}).memories_directory == Path.home() / "memories"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"memories": ""}, "it must be a folder"),
        ({"memories": ",prefix"}, "it must be a folder"),
        ({"memories": True}, "it must be a folder"),
        ({"memories": "a", "memories_max_bytes": 0}, "whole number from 1"),
        ({"memories": "a", "memories_max_bytes": "1GB"}, "whole number from 1"),
        ({"memories_max_bytes": 5}, "Give both or neither"),
    ],
)
def test_memories_that_can_not_be_kept_are_refused(given: Any, words: str):
    with pytest.raises(ValueError, match=words):
        options({"armt": given})


def test_unknown_options_are_named_with_the_known_ones():
    known = "schedule, attention, target_rows, memories, memories_max_bytes, memories_max_upload_bytes"
    with pytest.raises(ValueError, match=rf"unknown options depth, width; known: {known}\."):
        options({"armt": {"width": 2, "depth": 1}})


@pytest.mark.parametrize("beside", [{}, {"armt": {"attention": "sdpa"}}])
def test_an_option_beside_armt_is_sent_below_it(beside: dict[str, Any]):
    message = r"""additional_config has schedule, memories at its top.*--additional-config '\{"armt": \{"schedule": """
    with pytest.raises(ValueError, match=message):
        options(beside | {"memories": "/srv", "schedule": "diagonal"})

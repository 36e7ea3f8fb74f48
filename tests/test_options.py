"""Options of the plugin under `additional_config["armt"]`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_armt.options import SCHEDULES, Options


def options(additional_config: Any) -> Options:
    return Options.of(SimpleNamespace(additional_config=additional_config))


@pytest.mark.parametrize("additional_config", [{}, None, {"armt": {}}, {"another plugin": {"schedule": "x"}}])
def test_without_options_the_schedule_is_automatic(additional_config: Any):
    assert options(additional_config) == Options(schedule="auto")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_may_be_chosen(schedule: str):
    assert options({"armt": {"schedule": schedule}}).schedule == schedule


def test_a_schedule_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"\[\"schedule\"\] is 'fast'; allowed: 'auto', 'diagonal', 'sequential'\."):
        options({"armt": {"schedule": "fast"}})


def test_unknown_options_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown options depth, width; known: schedule"):
        options({"armt": {"width": 2, "depth": 1}})

"""`vllm-armt doctor`: how findings are printed, and the code that it ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_armt.doctor import Finding, machine, packages


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch):
    """Make the machine have these findings and no others."""

    def have(*findings: Finding) -> None:
        monkeypatch.setattr(packages, "packages", lambda: findings)
        monkeypatch.setattr(machine, "devices", tuple)
        monkeypatch.setattr(machine, "folders", lambda _: ())

    return have


GOOD = Finding("vLLM", "ok", "0.32.0.")
BAD = Finding("torchaudio", "wrong", "It does not import.", lambda: "It was uninstalled.")


def test_a_line_a_finding(run, machine_of) -> None:
    machine_of(GOOD)
    assert run("doctor") == (0, "ok    vLLM: 0.32.0.\n", "")


def test_what_is_wrong_is_counted_and_ends_with_1(run, machine_of) -> None:
    machine_of(GOOD, BAD)
    assert run("doctor") == (1, "ok    vLLM: 0.32.0.\nWRONG torchaudio: It does not import.\n", "1 thing is wrong.\n")


def test_what_is_mended_is_not_wrong(run, machine_of) -> None:
    machine_of(BAD)
    assert run("doctor", "--fix") == (0, "FIXED torchaudio: It was uninstalled.\n", "")


def test_findings_are_an_object_for_programs(run, machine_of) -> None:
    machine_of(GOOD, BAD)
    code, out, err = run("doctor", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out) == {
        "ok": False,
        "findings": [
            {"about": "vLLM", "state": "ok", "said": "0.32.0."},
            {"about": "torchaudio", "state": "wrong", "said": "It does not import."},
        ],
    }


def test_a_checkpoint_that_is_none_is_named(run, machine_of, tmp_path: Path) -> None:
    machine_of(GOOD)
    code, out, _ = run("doctor", tmp_path / "absent")
    assert code == 1
    assert f"WRONG checkpoint: {tmp_path / 'absent'} is no directory." in out
    assert f"WRONG config.json: {tmp_path / 'config.json'} does not exist." in run("doctor", tmp_path)[1]

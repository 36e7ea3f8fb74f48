"""Set-up of all tests: a small, in-process vLLM on one thread, and helpers on the path."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

# before anything imports vLLM; an in-process engine starts in seconds this way
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    # each engine binds vLLM's log to the stream of that moment; pytest closes sys.stdout after a test, but not this one
    "VLLM_LOGGING_STREAM": "ext://sys.__stderr__",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Triton's kernels are run by its interpreter, which must be known before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from tests.support.golden_cases import OLDER, Golden
from tests.support.small_model import GOLDEN

TESTS = Path(__file__).parent

# how fast examples are drawn says how busy the machine is, and nothing about what is tested
settings.register_profile("busy", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let `pytest -n` keep tests of one file in one process, and all of the server: they share what they start.

    Those of the server take longest and come first, or one process would wait for them at the end.
    """
    for item in items:
        file = item.path.relative_to(TESTS)
        item.add_marker(pytest.mark.xdist_group("server" if file.parts[0] == "server" else str(file)))
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] != "server")


@pytest.fixture(scope="session")
def golden_directory(tmp_path_factory):
    """A function from a golden to the directory that serves it: its own, or the converted one.

    Fields given by name are changed in its config.json, for instance `segment_alignment="right"`.
    """
    from vllm_armt.checkpoints import WrapperArgs, convert

    @cache
    def directory(golden: Golden, **fields: Any) -> Path:
        target = tmp_path_factory.mktemp("goldens") / golden.name
        if golden.is_hf:
            golden.copy_checkpoint(target)
        elif golden in OLDER:
            base = golden.path / "base_config" if golden.code_version == "il08" else None
            convert(golden.path, target, base, code_version=golden.code_version)
        else:
            args = WrapperArgs.resolve(golden.path / "armt_args.json")
            convert(golden.checkpoint, target, golden.path / "base_config", args)
        config = target / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields, indent=2))
        return target

    return directory


@pytest.fixture(scope="session")
def reference(golden_directory):
    """The readable model with the small model's weights."""
    from transformers import AutoModelForCausalLM

    import vllm_armt.hf  # noqa: F401  (registers the model)

    return AutoModelForCausalLM.from_pretrained(golden_directory(GOLDEN), dtype=torch.float32).eval()

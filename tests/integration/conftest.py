"""What the tests of the hook share: a checkpoint without weights, what vLLM makes of it, and what is logged."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator

import pytest
from vllm.config import (
    VllmConfig,
)

from tests.support.golden_cases import HF
from tests.support.hook_configs import LIMITS, complete
from vllm_armt import register
from vllm_armt.integration.hooks import (
    logger,
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the config.json of a golden, and no weights."""
    directory = tmp_path_factory.mktemp("checkpoint")
    shutil.copy(HF[0].path / "config.json", directory)
    register()
    return str(directory)


@pytest.fixture(scope="session")
def completed(checkpoint: str) -> VllmConfig:
    return complete(checkpoint, **LIMITS)


@pytest.fixture
def vllm_config(completed: VllmConfig) -> VllmConfig:
    """A copy whose parts a test may change."""
    config = copy.copy(completed)
    for part in ("model_config", "cache_config", "parallel_config", "scheduler_config", "compilation_config"):
        setattr(config, part, copy.copy(getattr(config, part)))
    config.offload_config = copy.deepcopy(config.offload_config)
    return config


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the hook logs; vLLM's loggers hand nothing on to the root, where pytest listens."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield logged
    logger.removeHandler(handler)
    logger.setLevel(level)

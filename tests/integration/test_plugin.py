"""Registration: harmless to repeat, cheap for other models, and only with versions of vLLM that were verified."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers import AutoConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

from vllm_armt import register
from vllm_armt.config import CONFIGS
from vllm_armt.integration.hooks import RecurrentArchConvertor, RecurrentHook
from vllm_armt.integration.plugin import MODELS, check_vllm_version

ROOT = Path(__file__).parents[2]


def test_registering_twice_is_harmless():
    register()
    register()
    for config in CONFIGS:
        architecture = MODELS[config.model_type].split(":")[1]
        assert architecture in ModelRegistry.get_supported_archs()
        assert MODELS_CONFIG_MAP[architecture] is RecurrentHook
        assert MODEL_ARCH_CONFIG_CONVERTORS[config.model_type] is RecurrentArchConvertor
        fields = dict.fromkeys(config.required, 2)
        made = AutoConfig.for_model(config.model_type, base_model_config={"model_type": "llama"}, **fields)
        assert type(made) is config


@pytest.mark.parametrize("model", MODELS.values())
def test_a_registered_model_exists(model: str):
    module, name = model.split(":")
    assert getattr(import_module(module), name).__name__ == name


def test_registration_imports_nothing_that_only_our_models_need():
    code = (
        "import json, sys, vllm_armt\n"
        "vllm_armt.register()\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('vllm_armt.')]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = json.loads(result.stdout.splitlines()[-1])
    assert {name.split(".")[1] for name in imported} == {"config", "core", "integration", "options"}
    hooks = {name.split(".")[2] for name in imported if name.startswith("vllm_armt.integration.")}
    assert hooks == {"plugin", "hooks"}


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.32.0+cpu", "0.33.1.dev3"])
def test_verified_versions_are_accepted(version: str):
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.30.9", "0.31.0rc1", "0.34.0.dev1", "0.34.0rc1", "0.34.0", "1.0.0"])
def test_other_versions_are_refused_with_what_to_install(version: str):
    with pytest.raises(RuntimeError, match=rf"installed is {version}\..*pip install 'vllm>=0.31.0,<0.34.0'"):
        check_vllm_version(version)

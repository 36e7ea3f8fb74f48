"""Which GEMM backend is chosen, and the dtype in which rows multiply."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import vllm._custom_ops as ops
from torch import Tensor

from vllm_armt.linear import choose, grouped, onednn
from vllm_armt.linear.choose import choose_gemm, gemm_dtype

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def set_machine(monkeypatch: pytest.MonkeyPatch, *, refused: tuple[torch.dtype, ...] = (), capability: int = 90):
    """Make this a machine whose oneDNN refuses some dtypes, with a GPU of a compute capability."""

    def create_onednn_mm(weight: Tensor, primitives: int) -> None:
        if weight.dtype in refused:
            raise RuntimeError("could not create a primitive descriptor for the matmul primitive")

    monkeypatch.setattr(ops, "_supports_onednn", True)
    monkeypatch.setattr(ops, "create_onednn_mm", create_onednn_mm)
    uncached = onednn.onednn_dtype.__wrapped__
    for module in (onednn, choose):
        monkeypatch.setattr(module, "onednn_dtype", uncached)
    platform = SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda least: capability >= least)
    monkeypatch.setattr(grouped, "current_platform", platform)


@pytest.mark.parametrize(
    ("device", "dtype", "in_features", "name"),
    [
        (CPU, FLOAT32, 12, "onednn"),
        (CPU, BFLOAT16, 16, "onednn"),
        (CUDA, BFLOAT16, 16, "grouped"),
        (CUDA, BFLOAT16, 12, "batched"),
        (CUDA, torch.float16, 16, "batched"),
        (CUDA, FLOAT32, 16, "batched"),
        (META, BFLOAT16, 16, "batched"),
    ],
)
def test_the_fastest_backend_that_runs_is_chosen(
    device: torch.device, dtype: torch.dtype, in_features: int, name: str, monkeypatch: pytest.MonkeyPatch
):
    set_machine(monkeypatch)
    assert choose_gemm(device, dtype, in_features).name == name


def test_a_gpu_that_would_wait_for_grouped_mm_does_without(monkeypatch: pytest.MonkeyPatch):
    set_machine(monkeypatch, capability=80)
    assert choose_gemm(CUDA, BFLOAT16, 16).name == "batched"


def test_a_cpu_whose_onednn_multiplies_nothing_does_without(monkeypatch: pytest.MonkeyPatch):
    set_machine(monkeypatch, refused=(FLOAT32, BFLOAT16))
    assert choose_gemm(CPU, BFLOAT16, 16).name == "batched"


def test_the_log_says_once_what_is_used_and_why_not_the_others(monkeypatch: pytest.MonkeyPatch):
    set_machine(monkeypatch)
    said: list[tuple[object, ...]] = []
    # vLLM says the same with the same arguments once a process
    monkeypatch.setattr(choose.logger, "info_once", lambda *words: said.append(words))
    for _ in range(2):
        choose_gemm(CUDA, BFLOAT16, 9999)
    ((text, *words),) = set(said)
    assert str(text) % tuple(words) == (
        "GEMM of torch.bfloat16: batched (onednn: vLLM's oneDNN products run on CPUs, not on cuda; "
        "grouped: torch's grouped_mm takes multiples of 8 input features, not 9999)."
    )


@pytest.mark.parametrize(
    ("refused", "on_cpu"),
    [((), BFLOAT16), ((BFLOAT16,), FLOAT32), ((BFLOAT16, FLOAT32), BFLOAT16)],
    ids=["it takes all", "no bfloat16", "it takes nothing, torch multiplies"],
)
def test_rows_multiply_in_their_own_dtype_unless_the_cpu_cannot(
    refused: tuple[torch.dtype, ...], on_cpu: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    set_machine(monkeypatch, refused=refused)
    assert gemm_dtype(BFLOAT16, CPU) == on_cpu
    assert gemm_dtype(BFLOAT16, CUDA) == BFLOAT16
    assert gemm_dtype(FLOAT32, CPU) == FLOAT32

"""Which backend of attention is chosen, and which is refused."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.attention.backends import fa_utils

from vllm_armt.attention import Attention, AttentionShape, LayerAttention, choose_attention, xformers
from vllm_armt.attention import choose as chosen
from vllm_armt.attention.flash_attn import FlashAttention
from vllm_armt.attention.sdpa import SDPAttention
from vllm_armt.attention.vllm_cpu import VllmCPUAttention
from vllm_armt.attention.xformers import XformersAttention
from vllm_armt.core import SegmentLayout, Window


def choose(
    name: str,
    device: str,
    head_dim: int = 64,
    window: Window | None = None,
    dtype: torch.dtype = torch.bfloat16,
    full_suffix: bool = False,
    reach: int | None = None,
) -> Attention:
    layout = SegmentLayout(0, 36, 4, full_suffix=full_suffix)
    shape = AttentionShape(dtype, 2, 1, head_dim, layout, 64, window, reach)
    return choose_attention(name, torch.device(device), shape)


@pytest.fixture(autouse=True)
def no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that vLLM has no kernels for."""
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **shape: None)


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that it has some for, which need not be there to choose a backend for it."""
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **shape: 3)
    monkeypatch.setattr(FlashAttention, "__init__", lambda self, device, shape: None)


@pytest.fixture(params=[True, False], ids=["xformers installed", "xformers missing"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether xformers is there; the device need not be to choose a backend for it."""
    monkeypatch.setattr(xformers, "find_spec", lambda name: object() if request.param else None)
    monkeypatch.setattr(xformers, "why_no_kernel", lambda device, shape: "")
    return request.param


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_auto_takes_vllms_kernel_on_cpus(head_dim: int, installed: bool):
    assert type(choose("auto", "cpu", head_dim)) is VllmCPUAttention


@pytest.mark.parametrize("head_dim", [6, 8, 48])
def test_auto_takes_sdpa_on_cpus_where_the_kernel_lacks_the_head_size(head_dim: int, installed: bool):
    assert type(choose("auto", "cpu", head_dim)) is SDPAttention


def test_auto_takes_xformers_on_cuda_where_it_is_installed(installed: bool):
    assert type(choose("auto", "cuda")) is (XformersAttention if installed else SDPAttention)


def test_auto_takes_sdpa_where_xformers_is_installed_without_kernels_that_load(monkeypatch: pytest.MonkeyPatch):
    reason = "none of its kernels can attend these cells (xFormers wasn't build with CUDA support)"
    monkeypatch.setattr(xformers, "find_spec", lambda name: object())
    monkeypatch.setattr(xformers, "why_no_kernel", lambda device, shape: reason)
    assert type(choose("auto", "cuda")) is SDPAttention
    with pytest.raises(ValueError, match=r"'xformers', which can't be used here: none of its kernels.*'auto', 'sdpa'"):
        choose("xformers", "cuda")


def test_auto_takes_flash_attention_on_cuda_where_vllm_has_its_kernels(installed: bool, flash_attention):
    assert type(choose("auto", "cuda")) is FlashAttention
    assert type(choose("auto", "cuda", dtype=torch.float16)) is FlashAttention


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": torch.float32}, r"it takes torch\.float16 and torch\.bfloat16, not torch\.float32\. Usable here: "),
        ({"head_dim": 264}, r"it takes heads of 8, 16 and so on up to 256, not of 264\. Usable here: "),
        ({"head_dim": 20}, r"it takes heads of 8, 16 and so on up to 256, not of 20\. Usable here: "),
        (
            {"window": "all"},
            r"its masks are causal, without a window into the segment before\. Usable here: 'auto', 'sdpa'",
        ),
    ],
)
def test_flash_attention_is_refused_what_its_kernels_do_not_take(given, message: str, installed, flash_attention):
    with pytest.raises(ValueError, match=r"'flash_attn', which can't be used here: " + message):
        choose("flash_attn", "cuda", **given)
    assert type(choose("auto", "cuda", **given)) is not FlashAttention


def test_flash_attention_is_refused_where_vllm_has_no_kernels_and_on_other_devices(installed: bool):
    with pytest.raises(ValueError, match="vLLM has none of its kernels for this device"):
        choose("flash_attn", "cuda")
    with pytest.raises(ValueError, match="its kernels run on CUDA, not on cpu"):
        choose("flash_attn", "cpu")


def test_auto_takes_sdpa_on_other_devices(installed: bool):
    assert type(choose("auto", "xpu")) is SDPAttention


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_sdpa_is_never_refused(device: str, installed: bool):
    assert type(choose("sdpa", device, head_dim=6)) is SDPAttention


def test_a_backend_that_is_named_is_taken_where_it_runs():
    assert type(choose("vllm_cpu", "cpu")) is VllmCPUAttention


def test_xformers_is_refused_on_cpus_with_what_can_be_used(installed: bool):
    with pytest.raises(
        ValueError,
        match=r'additional_config\["armt"\]\["attention"\] is \'xformers\', which can\'t be used here: its kernels run '
        r"on CUDA, not on cpu\. Usable here: 'auto', 'vllm_cpu', 'sdpa'\.",
    ):
        choose("xformers", "cpu")


def test_xformers_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(xformers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"xformers is not installed.*Usable here: 'auto', 'sdpa'\."):
        choose("xformers", "cuda")


def test_a_head_size_that_vllms_kernel_lacks_is_refused_with_those_it_has():
    with pytest.raises(ValueError, match=r"takes heads of \[32, 64, .*\], not of 8\. Usable here: 'auto', 'sdpa'\."):
        choose("vllm_cpu", "cpu", head_dim=8)


def test_vllms_kernel_is_refused_on_other_devices(installed: bool):
    with pytest.raises(ValueError, match=r"runs on CPUs, not on cuda\."):
        choose("vllm_cpu", "cuda")


@pytest.mark.parametrize("window", ["all", "tokens"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_takes_sdpa_where_segments_see_the_one_before(device: str, window: Window, installed: bool):
    assert type(choose("auto", device, window=window)) is SDPAttention


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sdpa_alone_attends_memory_tokens_that_see_one_another(device: str, installed: bool, flash_attention):
    assert type(choose("auto", device, full_suffix=True)) is SDPAttention
    for name in ("vllm_cpu",) if device == "cpu" else ("flash_attn", "xformers"):
        with pytest.raises(ValueError, match=r"(is|are) causal, without memory tokens that see one another\. "):
            choose(name, device, full_suffix=True)


@pytest.mark.parametrize("window", ["all", "tokens"])
def test_vllms_kernel_is_refused_where_segments_see_the_one_before(window: Window):
    with pytest.raises(
        ValueError,
        match=r"'vllm_cpu', which can't be used here: the mask of vLLM's kernel is causal, without a window into the "
        r"segment before\. Usable here: 'auto', 'sdpa'\.",
    ):
        choose("vllm_cpu", "cpu", window=window)


@pytest.mark.parametrize("window", ["all", "tokens"])
def test_xformers_is_refused_where_segments_see_the_one_before(window: Window, installed: bool):
    with pytest.raises(ValueError, match=r"is causal, without a window into the segment before\. Usable here: "):
        choose("xformers", "cuda", window=window)


def test_layers_that_see_a_part_of_their_segment_have_every_backend_but_xformers(installed: bool, flash_attention):
    assert type(choose("auto", "cpu", reach=5)) is VllmCPUAttention
    assert type(choose("auto", "cuda", reach=5)) is FlashAttention
    with pytest.raises(ValueError, match="has no layers that see a part of their segment only"):
        choose("xformers", "cuda", reach=5)


def test_all_layers_have_one_backend_once_for_each_reach():
    shape = AttentionShape(torch.float32, 2, 1, 64, SegmentLayout(0, 36, 4), 64)
    attention = LayerAttention.choose("auto", torch.device("cpu"), shape, [5, None, 5])
    assert [type(backend) for backend in attention.backends] == [VllmCPUAttention] * 2
    assert attention.kinds == [0, 1, 0]
    assert len(LayerAttention.choose("auto", torch.device("cpu"), shape, [None] * 3).backends) == 1


def test_the_log_says_what_is_taken_and_why_no_other_could_be(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(chosen.logger, "info", lambda text, *words: said.append(text % words))
    monkeypatch.setattr(xformers, "find_spec", lambda name: None)
    choose("auto", "cuda")
    assert said == [
        "Attention: sdpa (vllm_cpu: it runs on CPUs, not on cuda; flash_attn: vLLM has none of its kernels for this "
        "device; xformers: xformers is not installed (pip install xformers))."
    ]

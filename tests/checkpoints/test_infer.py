"""What the tensors say is taken from them, and must be what was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.golden_cases import relative_l2
from tests.support.research_checkpoint import Case
from tests.support.small_hf import S, Small, text

POSITIONS = "memory_cell.model.transformer.wpe.weight"


def set_beta(case: Case, rows: int) -> None:
    """Give every layer's memory so many betas."""
    for key in case.tensors:
        if key.endswith(".W_mb.weight"):
            case.tensors[key] = torch.randn(rows, 64)
        elif key.endswith(".W_mb.bias"):
            case.tensors[key] = torch.randn(rows)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("armt_llama_untied", {"model_type": "armt", "num_mem_tokens": 3, "d_mem": 12, "n_heads": 1, "gating": False}),
        ("armt_gpt2_wrap", {"model_type": "armt", "num_mem_tokens": 4, "d_mem": 8, "wrap_pos": True}),
        ("armtv2_gpt2_nowrap", {"model_type": "armt", "wrap_pos": False}),
        ("prmt_gpt2_wrap", {"model_type": "prmt", "num_mem_tokens": 4, "wrap_pos": True}),
        ("rmt_gpt2_wrap", {"model_type": "rmt", "num_mem_tokens": 4, "wrap_pos": True}),
        ("rmt_llama", {"model_type": "rmt", "num_mem_tokens": 4, "wrap_pos": False}),
    ],
)
def test_only_the_rest_must_be_given(make_case: Callable[[str], Case], name: str, told: dict[str, Any]) -> None:
    case = make_case(name)
    case.args = {"segment_size": 16} | ({"variant": "v2"} if told["model_type"] == "armt" else {})
    config = case.convert().config
    assert {field: getattr(config, field) for field in told} == told


class TestHeads:
    @pytest.fixture
    def v2(self, make_case: Callable[[str], Case]) -> Case:
        case = make_case("armtv2_llama")
        for name in ("n_heads", "gating"):
            del case.args[name]
        return case

    def test_several_are_several_betas(self, v2: Case) -> None:
        set_beta(v2, 2)
        conversion = v2.convert()
        assert (conversion.config.n_heads, conversion.config.gating) == (2, False)
        assert conversion.assumed == {"segment_alignment": "left", "generation_policy": "open"}

    @pytest.mark.parametrize("heads", [1, 4])
    def test_gating_is_a_beta_a_channel_and_leaves_heads_to_be_given(self, v2: Case, heads: int) -> None:
        set_beta(v2, 64)
        v2.given = {"n_heads": heads}
        conversion = v2.convert()
        assert (conversion.config.n_heads, conversion.config.gating) == (heads, True)
        assert conversion.assumed == {"segment_alignment": "left", "generation_policy": "open"}

    def test_gating_without_their_number_is_refused(self, v2: Case) -> None:
        set_beta(v2, 64)
        v2.refused("`n_heads` is not in the checkpoint and cannot be guessed. Give it: --n-heads N")

    def test_the_first_releases_have_one(self, tied: Case) -> None:
        set_beta(tied, 2)
        tied.refused("exist from variant 'v2' on")

    def test_so_many_do_not_divide_the_memory(self, v2: Case) -> None:
        set_beta(v2, 3)
        v2.refused("`n_heads` is 3")


class TestPositions:
    def test_a_number_of_rows_that_no_wrapper_has(self, gpt2: Case) -> None:
        gpt2.tensors[POSITIONS] = torch.ones(133, 64)
        gpt2.refused("has 133 rows; by the base model's config it must be 128, or 132")

    def test_an_rmt_has_twice_as_many(self, make_case: Callable[[str], Case]) -> None:
        case = make_case("rmt_gpt2_wrap")
        case.tensors[POSITIONS] = torch.ones(132, 64)
        case.refused("must be 128, or 136")

    def test_the_transformer_xl_cache_goes_with_them(self, gpt2: Case) -> None:
        gpt2.given = {"sliding_window": True}
        assert gpt2.convert().config.sliding_window

    def test_it_does_not_go_without(self, make_case: Callable[[str], Case]) -> None:
        case = make_case("armtv2_gpt2_nowrap")
        case.args["sliding_window"] = True
        case.refused("`sliding_window` is true")

    def test_a_backbone_without_any(self, tied: Case) -> None:
        tied.args["wrap_pos"] = True
        tied.refused("`wrap_pos` is true, but a llama has no learned positions")


class TestLayers:
    @pytest.mark.parametrize("wrapped", [[False, True, True], [True, False, True], [False, False, True]], ids=str)
    def test_those_without_a_memory_are_told_and_stay_without(self, tied: Case, wrapped: list[bool]) -> None:
        model = Small("armt", "llama", {"wrap_layers": wrapped, "generation_policy": "open"}).build()
        tied.tensors = {
            f"memory_cell.{name}": tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()
        }
        tied.args = {"segment_size": S, "variant": "v2"}
        assert tied.convert().config.wrap_layers == wrapped
        converted = AutoModelForCausalLM.from_pretrained(tied.dst).eval()
        ids = text(3 * S + 5)
        assert relative_l2(converted(ids).logits.detach(), model(ids).logits.detach()) < 1e-5

    def test_one_with_half_a_memory_is_not_taken_for_one_without(self, tied: Case) -> None:
        del tied.tensors["memory_cell.layers.0.W_mq.weight"]
        tied.refused("Missing tensor 'model.model.layers.0.W_mq.weight'")


@pytest.mark.parametrize(
    ("name", "field", "given", "found"),
    [
        ("armt_llama_gqa_tied", "num_mem_tokens", 5, 4),
        ("armt_llama_gqa_tied", "d_mem", 16, 8),
        ("armt_llama_gqa_tied", "n_heads", 2, 1),
        ("armt_llama_gqa_tied", "gating", True, False),
        ("armt_llama_gqa_tied", "wrap_layers", [False, True, True], [True, True, True]),
        ("armt_gpt2_wrap", "wrap_pos", False, True),
        ("armtv2_gpt2_nowrap", "wrap_pos", True, False),
        ("prmt_gpt2_wrap", "num_mem_tokens", 5, 4),
        ("prmt_gpt2_wrap", "system", "rmt", "prmt"),
        ("rmt_llama", "system", "armt", "rmt"),
        ("armt_neox", "system", "prmt", "armt"),
    ],
)
def test_what_contradicts_the_tensors_is_refused(
    make_case: Callable[[str], Case], name: str, field: str, given: Any, found: Any
) -> None:
    case = make_case(name)
    case.given = {field: given}
    case.refused(f"`{field}` was given as {given!r}, but the checkpoint's tensors say {found!r}")


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        ("armt_neox", "memory_cell.memory", "memory"),
        ("rmt_llama", "memory_cell.memory", "memory"),
        ("armt_neox", "memory_cell.model.gpt_neox.layers.0.W_mb.weight", "model.gpt_neox.layers.0.W_mb.weight"),
        ("prmt_gpt2_wrap", "memory_cell.layers.0.memory", "model.transformer.h.0.memory"),
        ("prmt_gpt2_wrap", POSITIONS, "model.transformer.wpe.weight"),
    ],
)
def test_what_it_is_read_from_must_be_there(
    make_case: Callable[[str], Case], name: str, missing: str, said: str
) -> None:
    case = make_case(name)
    del case.tensors[missing]
    case.refused(f"Missing tensor {said!r}")


def test_a_memory_of_another_form(rmt: Case) -> None:
    rmt.tensors["memory_cell.memory"] = torch.ones(1, 4, 64)
    rmt.refused("'memory' has shape [1, 4, 64]; it must be [m, d]")

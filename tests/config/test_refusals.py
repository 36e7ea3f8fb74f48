"""What a config.json may not say, and in which words it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.configs import REQUIRED, config, every_system
from vllm_armt.config import ARMTConfig, PRMTConfig, RecurrentConfig, RMTConfig, supported_backbones


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_required_field_is_named(name: str):
    with pytest.raises(ValueError, match=rf"config.json has no `{name}`.*cannot be guessed.*trained with"):
        config(**{name: None})


@pytest.mark.parametrize("value", [0, -1, 1.5, "16", True])
@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_field_out_of_range_is_refused(name: str, value: Any):
    with pytest.raises(ValueError, match=rf"`{name}` is {value!r}; it must be an integer of at least 1"):
        config(**{name: value})


@every_system
def test_a_backbone_that_is_not_supported_is_refused_with_those_that_are(system: type[RecurrentConfig]):
    with pytest.raises(
        ValueError, match=rf"of type 'opt', which is not supported\. Supported: {supported_backbones()}\."
    ):
        config(system=system, base_model_config={"model_type": "opt"})


def test_a_base_model_without_a_type_is_refused():
    with pytest.raises(
        ValueError, match=rf"`base_model_config` has no `model_type`\. Supported: {supported_backbones()}"
    ):
        config(base_model_config={"hidden_size": 16})


def test_no_base_model_is_refused():
    with pytest.raises(ValueError, match=r"neither `base_model_config`.*nor `base_model_name`"):
        config(base_model_config=None)


def test_layers_in_another_place_are_refused():
    with pytest.raises(ValueError, match=r"`layers_attr` is 'transformer.h', but a llama keeps .* 'model.layers'"):
        config(layers_attr="transformer.h")


@pytest.mark.parametrize("n_heads", [3, 5])
def test_heads_divide_queries_and_values(n_heads: int):
    with pytest.raises(
        ValueError, match=rf"`n_heads` is {n_heads}; it must divide d_mem \(8\) and the hidden size \(16\)"
    ):
        config(n_heads=n_heads)


@pytest.mark.parametrize("fields", [{"n_heads": 2}, {"gating": True}])
def test_the_first_releases_have_neither_heads_nor_gating(fields: dict[str, Any]):
    with pytest.raises(ValueError, match="exist from variant 'v2' on"):
        config(variant="v1", **fields)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("variant", "'v1', 'v2'"),
        ("generation_policy", "'commit', 'open'"),
        ("state_dtype", "'float32', 'bfloat16'"),
        ("segment_alignment", "'left', 'right', 'center'"),
        ("learned_positions", "'grow', 'restart'"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(name: str, allowed: str):
    with pytest.raises(ValueError, match=rf"`{name}` is 'other'; allowed: {allowed}\."):
        config(**{name: "other"})


def test_wrap_layers_of_another_length_than_the_model_is_refused():
    with pytest.raises(ValueError, match="`wrap_layers` has 2 entries, but the base model has 3 layers"):
        config(wrap_layers=[True, False])


@pytest.mark.parametrize("name", ["model_dtype", "memory_dtype"])
def test_a_name_that_is_no_dtype_is_refused(name: str):
    with pytest.raises(
        ValueError, match=r"'fp32' is not a floating-point torch dtype of weights; write 'float16', 'bfloat16'"
    ):
        config(**{name: "fp32"})


REFUSED = ["act_on", "attend_to_previous_input"]


@every_system
def test_old_fields_at_harmless_values_are_dropped(system: type[RecurrentConfig]):
    old = config(system=system, **dict.fromkeys(REFUSED, False))
    assert not old.to_dict().keys() & set(REFUSED)


@every_system
@pytest.mark.parametrize("name", REFUSED)
def test_old_fields_that_change_the_mathematics_are_refused(name: str, system: type[RecurrentConfig]):
    with pytest.raises(ValueError, match=rf"`{name}` is True\..*only False is\."):
        config(system=system, **{name: True})


def test_settings_of_options_that_are_off_are_dropped():
    dropped = {"act_type": "layer", "max_hop": 4, "time_penalty": 0.1, "base_attn_implementation": "eager"}
    assert not config(**dropped).to_dict().keys() & dropped.keys()


@pytest.mark.parametrize(
    ("system", "field"),
    [
        *((system, field) for system in (RMTConfig, PRMTConfig) for field in ("n_heads", "gating", "use_sink")),
        (RMTConfig, "aliased"),
        (ARMTConfig, "aliased"),
    ],
)
def test_an_option_of_another_system_is_refused(system: type[RecurrentConfig], field: str):
    with pytest.raises(ValueError, match=rf"`{field}` is 4\..*not supported here"):
        config(system=system, **{field: 4})


def test_an_old_config_with_unwrapped_layers_is_refused():
    with pytest.raises(
        ValueError, match=r"`wrap_layers` leaves layers out and the config is an old one \(it has act_on"
    ):
        config(wrap_layers=[True, False, True], act_on=False)

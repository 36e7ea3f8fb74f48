"""What a configuration says of segments: where they lie, their rows and positions, the window between them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from tests.support.configs import GPT_NEO_SIZES, SIZES, config, gpt2
from vllm_armt.config import ARMTConfig, ARMTSWConfig, PRMTConfig, RecurrentConfig, RMTConfig
from vllm_armt.core import Segmentation, SegmentLayout


class TestSegmentation:
    @pytest.mark.parametrize("alignment", ["left", None])
    def test_segments_are_counted_from_the_first_token(self, alignment: str | None):
        opened = config(segment_alignment=alignment)
        assert not opened.needs_prompt_length
        assert opened.segmentation(40) == Segmentation(16)

    @pytest.mark.parametrize(
        ("alignment", "expected"),
        [("left", Segmentation(16, 0, 2)), ("right", Segmentation(16, 8, 2)), ("center", Segmentation(14, 0, 2))],
    )
    def test_a_segment_that_stays_open_goes_by_the_prompt(self, alignment: str, expected: Segmentation):
        opened = config(segment_alignment=alignment, generation_policy="open")
        assert opened.needs_prompt_length
        assert opened.segmentation(40) == expected

    @pytest.mark.parametrize("alignment", ["right", "center"])
    def test_an_alignment_by_the_prompts_end_needs_a_segment_that_stays_open(self, alignment: str):
        with pytest.raises(ValueError, match=rf"`segment_alignment` is '{alignment}'.*Only generation_policy 'open'"):
            config(segment_alignment=alignment)

    @pytest.mark.parametrize(
        ("system", "policy"),
        [(ARMTConfig, "commit"), (ARMTSWConfig, "commit"), (RMTConfig, "open"), (PRMTConfig, "open")],
    )
    def test_the_policy_is_that_of_the_code_which_the_files_come_from(self, system: type[RecurrentConfig], policy: str):
        assert config(system=system).generation_policy == policy


class TestSegmentLayout:
    @pytest.mark.parametrize(
        ("opened", "layout", "extra"),
        [
            pytest.param(config(), SegmentLayout(0, 16, 4), 0, id="rotary"),
            pytest.param(config(system=ARMTSWConfig, use_sink=True), SegmentLayout(1, 16, 4), 0, id="with a sink"),
            pytest.param(config(system=RMTConfig), SegmentLayout(4, 16, 4), 0, id="memory on both sides"),
            pytest.param(gpt2(), SegmentLayout(0, 16, 4, stride=20), 0, id="GPT-2 in the newest code"),
            pytest.param(gpt2(learned_positions="restart"), SegmentLayout(0, 16, 4), 0, id="GPT-2 in the releases"),
            pytest.param(gpt2(wrap_pos=True), SegmentLayout(0, 16, 4, 128), 4, id="GPT-2 with wrap_pos"),
            pytest.param(
                gpt2(ARMTSWConfig, use_sink=True), SegmentLayout(1, 16, 4, stride=21), 0, id="GPT-2 with a sink"
            ),
            pytest.param(gpt2(RMTConfig), SegmentLayout(4, 16, 4), 0, id="RMT of GPT-2"),
            pytest.param(
                gpt2(PRMTConfig, wrap_pos=True), SegmentLayout(4, 16, 4, 132), 8, id="PRMT of GPT-2 with wrap_pos"
            ),
        ],
    )
    def test_its_rows_and_positions(self, opened: RecurrentConfig, layout: SegmentLayout, extra: int):
        assert opened.segment_layout == layout
        assert opened.extra_positions == extra

    @pytest.mark.parametrize("positions", [39, 40, 41, 59, 60, 127])
    @pytest.mark.parametrize(("system", "sink"), [(ARMTConfig, {}), (ARMTSWConfig, {"use_sink": True})])
    def test_growing_positions_limit_the_text(self, system: type[ARMTConfig], sink: dict[str, bool], positions: int):
        opened = gpt2(system, positions, **sink)
        limit = opened.position_limit

        def needed(tokens: int) -> int:
            pieces = opened.segmentation(tokens).split(0, tokens)
            return 1 + max(max(opened.segment_layout.positions(p.segment, p.offset, p.n, p.closes)) for p in pieces)

        assert needed(limit) <= positions < needed(limit + 1)

    @pytest.mark.parametrize("alignment", ["right", "center"])
    def test_positions_do_not_grow_over_segments_that_are_not_counted_from_the_left(self, alignment: str):
        aligned = {"segment_alignment": alignment, "generation_policy": "open"}
        with pytest.raises(ValueError, match=rf"'{alignment}' and `learned_positions` is 'grow'.*'restart'"):
            gpt2(**aligned)
        assert gpt2(**aligned, learned_positions="restart").position_limit is None

    @pytest.mark.parametrize("opened", [config(), gpt2(learned_positions="restart"), gpt2(wrap_pos=True)])
    def test_positions_that_restart_do_not(self, opened: RecurrentConfig):
        assert opened.position_limit is None

    @pytest.mark.parametrize(
        ("opened", "tokens"),
        [
            (gpt2(learned_positions="restart"), 128),
            (gpt2(wrap_pos=True), 128),
            (gpt2(RMTConfig), 124),
            (gpt2(RMTConfig, wrap_pos=True), 128),
            (config(LlamaConfig(**SIZES, max_position_embeddings=100)), 100),
            (config(MistralConfig(**SIZES, max_position_embeddings=100, sliding_window=40), RMTConfig), 96),
        ],
    )
    def test_an_open_segment_holds_what_there_are_positions_for(self, opened: RecurrentConfig, tokens: int):
        assert opened.max_open_tokens == tokens

    def test_wrap_pos_needs_learned_positions(self):
        with pytest.raises(ValueError, match="`wrap_pos` is true, but a gpt_neox has no learned positions"):
            config(GPTNeoXConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=3), wrap_pos=True)

    def test_an_rmts_memory_with_positions_of_its_own_cannot_grow(self):
        with pytest.raises(ValueError, match="`wrap_pos` is true and `learned_positions` is 'grow'"):
            gpt2(RMTConfig, wrap_pos=True, learned_positions="grow")

    @pytest.mark.parametrize(("wrap_pos", "needed"), [(False, 24), (True, 16)])
    def test_a_segment_must_fit_the_learned_positions(self, wrap_pos: bool, needed: int):
        assert gpt2(RMTConfig, needed, wrap_pos=wrap_pos).segment_size == 16
        with pytest.raises(ValueError, match=rf"needs {needed} learned positions.*has {needed - 1}\. Use a smaller"):
            gpt2(RMTConfig, needed - 1, wrap_pos=wrap_pos)


class TestWindow:
    def test_it_needs_wrap_pos(self):
        with pytest.raises(ValueError, match=r"`sliding_window` is true.*`wrap_pos` only.*model_type 'armt_sw'"):
            config(system=RMTConfig, sliding_window=True)

    @pytest.mark.parametrize("system", [ARMTConfig, RMTConfig])
    def test_it_goes_with_wrap_pos(self, system: type[RecurrentConfig]):
        variant = {"variant": "v1"} if system is ARMTConfig else {}
        assert gpt2(system, wrap_pos=True, sliding_window=True, **variant).sliding_window

    def test_it_is_not_the_second_generations(self):
        with pytest.raises(ValueError, match="`sliding_window` with variant 'v2' is another mask"):
            gpt2(wrap_pos=True, sliding_window=True)

    def test_a_prmt_has_none(self):
        with pytest.raises(ValueError, match="a PRMT has none"):
            gpt2(PRMTConfig, wrap_pos=True, sliding_window=True)

    def test_an_armt_with_one_is_an_armt_sw(self):
        with pytest.raises(ValueError, match="that is model_type 'armt_sw', not 'armt'"):
            config(sliding_window_enabled=True)
        assert config(system=ARMTSWConfig, sliding_window_enabled=True).model_type == "armt_sw"

    def test_keys_before_lie_where_the_authors_code_has_them_for_the_base_model_unless_it_is_said(self):
        gemma = GemmaConfig(**SIZES, head_dim=8)
        assert config(system=ARMTSWConfig).window_shift == 0
        assert config(gemma, ARMTSWConfig, use_sink=True).window_shift == 21
        assert config(system=ARMTSWConfig, window_positions="grow").window_shift == 20
        assert config(gemma, ARMTSWConfig, window_positions="restart").window_shift == 0

    def test_learned_positions_say_themselves_how_keys_before_lie(self):
        with pytest.raises(ValueError, match=r"`window_positions` is 'grow', but a gpt2 has learned positions"):
            gpt2(ARMTSWConfig, window_positions="grow")

    @pytest.mark.parametrize("field", ["memory_attention", "window_edge", "window_positions"])
    def test_rules_of_attention_have_names(self, field: str):
        with pytest.raises(ValueError, match=f"`{field}` is 'other'; allowed: "):
            config(system=ARMTSWConfig, **{field: "other"})

    @pytest.mark.parametrize(
        "fields", [{"generation_policy": "open"}, {"n_heads": 2}, {"gating": True}, {"variant": "v1"}]
    )
    def test_an_armt_sw_is_what_the_newest_code_knows(self, fields: dict[str, Any]):
        with pytest.raises(ValueError, match="the authors' code knows no others"):
            config(system=ARMTSWConfig, **fields)


LOCAL = [
    pytest.param(MistralConfig(**SIZES, sliding_window=19), [19] * 3, id="mistral"),
    pytest.param(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=19, max_window_layers=1),
        [None, 19, 19],
        id="qwen2",
    ),
    pytest.param(GPTNeoConfig(**GPT_NEO_SIZES, window_size=19), [None, 19], id="gpt_neo"),
    pytest.param(
        Gemma3TextConfig(**SIZES, sliding_window=19, sliding_window_pattern=3), [19, 19, None], id="gemma3_text"
    ),
]


@pytest.mark.parametrize(("base", "reaches"), LOCAL)
def test_layers_with_a_sliding_window_shorter_than_a_segment_see_that_much_of_it(base: PretrainedConfig, reaches: list):
    assert config(base).reaches == reaches


@pytest.mark.parametrize(("base", "reaches"), LOCAL)
def test_local_layers_do_not_go_with_a_window_into_the_segment_before(base: PretrainedConfig, reaches: list):
    with pytest.raises(ValueError, match=r"sliding window of 19 tokens, .* the one before: 36 rows"):
        config(base, ARMTSWConfig, learned_positions="restart")


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(MistralConfig(**SIZES, sliding_window=20), id="mistral, as long as a segment"),
        pytest.param(MistralConfig(**SIZES, sliding_window=None), id="mistral without"),
        pytest.param(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=19), id="qwen2, off"),
        pytest.param(GPTNeoConfig(**GPT_NEO_SIZES, window_size=20), id="gpt_neo, as long as a segment"),
        pytest.param(LlamaConfig(**SIZES, sliding_window=19), id="llama, which has none whatever its file says"),
    ],
)
def test_a_sliding_window_that_no_segment_reaches_is_harmless(base: PretrainedConfig):
    assert set(config(base).reaches) == {None}


def test_a_segment_that_stays_open_outgrows_what_local_layers_see():
    base = MistralConfig(**SIZES, sliding_window=20, max_position_embeddings=64)
    assert set(config(base, generation_policy="open").reaches) == {20}


def test_a_head_whose_logits_are_squashed_is_refused():
    with pytest.raises(ValueError, match=r"`final_logit_softcapping` of the base model is 30\.0; only None"):
        config(Gemma3TextConfig(**SIZES, final_logit_softcapping=30.0))

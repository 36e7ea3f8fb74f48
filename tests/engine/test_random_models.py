"""Random models of every kind through the engine: it computes what the readable model does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.engine.test_systems import assert_computed, prompts
from tests.support.engines import engine, generate, greedy, pages_in_use
from tests.support.small_hf import Small
from vllm_armt.config import BACKBONES


@st.composite
def models(draw: st.DrawFn) -> Small:
    """A legal kind of model: system, backbone, sizes and options."""
    system = draw(st.sampled_from(["armt", "armt_sw", "prmt", "rmt"]))
    backbone = draw(st.sampled_from(sorted(BACKBONES)))
    options: dict[str, Any] = {
        "segment_size": draw(st.integers(1, 12)),
        "num_mem_tokens": draw(st.integers(1, 4)),
        "generation_policy": "commit" if system == "armt_sw" else draw(st.sampled_from(["commit", "open"])),
    }
    if BACKBONES[backbone].positions is not None:
        options["wrap_pos"] = system != "armt_sw" and draw(st.booleans())
        options["learned_positions"] = "restart"
        options["sliding_window"] = options["wrap_pos"] and system in ("armt", "rmt") and draw(st.booleans())
    if options["generation_policy"] == "open" and not options.get("sliding_window"):
        options["segment_alignment"] = draw(st.sampled_from(["left", "right", "center"]))
    layers = draw(st.integers(1, 4))
    if system.startswith("armt"):
        options |= draw(associative_memories(system, options, layers))
    elif system == "prmt":
        options["aliased"] = draw(st.booleans())
    return Small(system, backbone, options, layers)


@st.composite
def associative_memories(draw: st.DrawFn, system: str, options: dict[str, Any], layers: int) -> dict[str, Any]:
    """Options of the associative memory."""
    memory = {
        "correction": draw(st.booleans()),
        "use_denom": draw(st.booleans()),
        "wrap_layers": draw(st.none() | st.lists(st.booleans(), min_size=layers, max_size=layers)),
    }
    if system == "armt_sw":
        return memory | {"use_sink": draw(st.booleans()), "d_mem": draw(st.integers(1, 6))}
    if options.get("sliding_window") or draw(st.booleans()):
        return memory | {"variant": "v1", "d_mem": draw(st.integers(1, 6))}
    heads = draw(st.sampled_from([1, 2, 4]))
    return memory | {"n_heads": heads, "d_mem": heads * draw(st.integers(1, 3)), "gating": draw(st.booleans())}


@pytest.mark.slow
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    # a smaller example is not worth an engine for every try
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    models(),
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(1, 20),
    st.sampled_from(["auto", "diagonal", "sequential"]),
    st.sampled_from(["auto", "sdpa"]),
    st.integers(1, 300),
)
def test_the_engine_computes_what_the_readable_model_does(
    kind: Small, lengths: list[int], new_tokens: int, schedule: str, attention: str, target_rows: int
) -> None:
    model = kind.build()
    options = {"armt": {"schedule": schedule, "attention": attention, "target_rows": target_rows}}
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(Path(directory) / "model")
        with engine(
            Path(directory) / "model", additional_config=options, max_num_batched_tokens=40, enable_prefix_caching=False
        ) as llm:
            outputs = generate(llm, prompts(lengths), greedy(new_tokens, prompt_logprobs=-1))
            assert pages_in_use(llm) == 0
    assert_computed(model, outputs)

"""Weights that come again while an engine runs, from disk or from a trainer, in whole or in part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import LLM
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

import vllm_armt.hf  # noqa: F401  (registers the model)
from tests.support.engines import decoded_log_probs, engine, generate, greedy
from tests.support.golden_cases import Golden, relative_l2
from tests.support.small_model import log_probs, random_prompt
from vllm_armt.models.recurrent import RecurrentForCausalLM

State = dict[str, Tensor]
# in the vocabulary of both
PROMPT = [2 + token % 150 for token in random_prompt(50)]
# whose head is the embedding, and whose head is its own
GOLDENS = ["armt_hf_llama", "armt_hf_llama_untied"]


def served(llm: LLM) -> RecurrentForCausalLM:
    (model,) = llm.apply_model(lambda model: model)
    return model


def at_once(llm: LLM, weights: State) -> None:
    served(llm).load_weights(iter(weights.items()))


def one_by_one(llm: LLM, weights: State) -> None:
    """As TRL and OpenRLHF send them."""
    for item in weights.items():
        served(llm).load_weights([item])


def by_reload_weights(llm: LLM, weights: State) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})


def in_a_weight_update(llm: LLM, weights: State) -> None:
    """What vLLM's weight transfer does around what a trainer sends (vllm/distributed/weight_transfer)."""
    model = served(llm)
    with torch.no_grad():
        initialize_layerwise_reload(model)
        one_by_one(llm, weights)
        finalize_layerwise_reload(model, llm.model_config)


WAYS = [at_once, one_by_one, by_reload_weights, in_a_weight_update]
SENT: list[Callable[[str], bool]] = [
    lambda name: True,
    lambda name: "layers.1." in name and "q_proj" in name,
    lambda name: "embed_tokens" in name or "lm_head" in name,
    lambda name: name == "memory" or "W_m" in name,
    lambda name: "norm" in name,
]


@pytest.fixture(scope="module", params=GOLDENS)
def model(request: pytest.FixtureRequest, golden_directory) -> Iterator[tuple[LLM, PreTrainedModel]]:
    """An engine, and the readable model of the same weights."""
    directory = golden_directory(Golden(request.param))
    readable = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with engine(directory) as llm:
        yield llm, readable


def assert_serves(llm: LLM, readable: PreTrainedModel) -> None:
    llm.reset_prefix_cache()
    (output,) = generate(llm, [PROMPT], greedy(3))
    expected = log_probs(readable, PROMPT + list(output.outputs[0].token_ids))[len(PROMPT) - 1 :]
    assert relative_l2(decoded_log_probs(output), expected) < 1e-4


def checkpoint(readable: PreTrainedModel) -> State:
    tied = readable.config.tie_word_embeddings
    return {name: t.clone() for name, t in readable.state_dict().items() if not (tied and "lm_head" in name)}


@pytest.mark.parametrize("sent", SENT, ids=["all", "queries of a layer", "vocabulary", "memory", "norms"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_that_come_again_are_served_and_the_others_stay(
    way: Callable[[LLM, State], None], sent: Callable[[str], bool], model: tuple[LLM, PreTrainedModel]
):
    llm, readable = model
    old = checkpoint(readable)
    assert_serves(llm, readable)
    new = {name: tensor * 1.3 for name, tensor in old.items() if sent(name)}
    assert new
    changed = copy.deepcopy(readable)
    changed.load_state_dict(new, strict=False)
    assert relative_l2(log_probs(changed, PROMPT), log_probs(readable, PROMPT)) > 1e-3
    way(llm, new)
    assert_serves(llm, changed)
    way(llm, {name: old[name] for name in new})
    assert_serves(llm, readable)


def test_what_is_refused_leaves_a_server_that_serves(model: tuple[LLM, PreTrainedModel]):
    llm, readable = model
    unknown = {"model.model.layers.0.layer.mlp.up.weight": torch.zeros(3, 3)}
    for way in WAYS[:3]:
        with pytest.raises(ValueError, match=r"does not: model.model.layers.0.layer.mlp.up.weight\. "):
            way(llm, unknown)
        assert_serves(llm, readable)


def test_weights_that_vllm_made_up_are_not_mixed_with_others(golden_directory):
    golden = Golden(GOLDENS[0])
    with (
        engine(golden_directory(golden), load_format="dummy") as llm,
        pytest.raises(ValueError, match=r"made up \(load_format='dummy'\).* Start with a checkpoint"),
    ):
        at_once(llm, {"memory": torch.zeros(1)})

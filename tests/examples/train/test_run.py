"""A run by a recipe: what it leaves, that it goes on where it stopped, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

from examples.train import run as module
from examples.train.adapters import Adapters
from examples.train.fresh import make_fresh, make_model
from examples.train.recipe import Fresh, Recipe
from examples.train.run import run
from examples.train.trainer import StreamTrainer
from tests.support.tiny_recipe import FRESH, STAGE, TRAINING
from vllm_armt.babilong import TASKS
from vllm_armt.hf import RMTForCausalLM

RECIPES = sorted((Path(module.__file__).parent / "recipes").glob("*.yaml"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_a_run_leaves_a_model_and_what_it_reached(recipe, tmp_path: Path) -> None:
    second = STAGE | {"name": "second", "segment_size": 16, "max_steps": 2, "topic_weight": 0.0}
    one = recipe(stages=[STAGE, second])
    result = run(one)
    assert result == tmp_path / "run" / "model"
    config = AutoConfig.from_pretrained(result)
    assert config.segment_size == 16
    model = AutoModelForCausalLM.from_pretrained(result)
    assert AutoTokenizer.from_pretrained(result)(" Mary").input_ids
    assert not any("auxiliary" in name for name in weights(result))
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape == (1, 5)
    found = json.loads((tmp_path / "run" / "1-first" / "result.json").read_text())
    # one segment for two steps, then four
    assert (found["steps"], found["level"]) == (6, 4)
    assert [line["segments"] for line in found["log"]] == [4, 4, 4]
    assert found["validation"]["qa1"]["2"]["answers"] >= 20
    changed = weights(tmp_path / "run" / "1-first" / "model")
    before = weights(one.model)
    assert all(not torch.equal(changed[name], before[name]) for name in before)


def test_a_finished_run_is_left_as_it_is(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(recipe())
    before = weights(result)
    monkeypatch.setattr(StreamTrainer, "train", lambda *_, **__: pytest.fail("it was trained again"))
    assert run(recipe()) == result
    after = weights(result)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", [{}, {"carry": 0.7}], ids=["", "with memories carried on"])
def test_a_run_that_was_broken_off_ends_as_if_it_had_not_been(
    recipe, stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(run(recipe(stage, output=tmp_path / "whole")))
    step = StreamTrainer.training_step
    steps = []

    def breaks_off(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StreamTrainer, "training_step", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(stage))
    assert not (tmp_path / "run" / "model").exists()
    resumed = weights(run(recipe(stage)))
    # it goes on from the checkpoint after step 4
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_seeds_make_other_runs_and_the_same_seed_the_same_one(recipe, tmp_path: Path) -> None:
    results = [run(recipe(output=tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 0, 1))]
    first, again, other = (weights(result) for result in results)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("stage", [{"truncate": 2}, {"training": TRAINING | {"gradient_accumulation_steps": 2}}])
def test_truncation_and_accumulation_train(recipe, stage) -> None:
    one = recipe(stage | {"max_steps": 4})
    after, before = weights(run(one)), weights(one.model)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_streams_go_on_from_memories_of_their_level(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    ages: list[tuple[int, int]] = []
    step = StreamTrainer.training_step

    def notes_ages(self, model, inputs, *args, **kwargs):
        level = int(inputs["level"])
        before = self.carried.states[level].segments if level in self.carried.states else 0
        loss = step(self, model, inputs, *args, **kwargs)
        state = self.carried.states[level]
        ages.append((state.segments - before, state.segments))
        assert not any(x.requires_grad for tensors in (state.M, state.z, state.memory) for x in tensors.values())
        assert state.batch_size == len(inputs["ids"])
        return loss

    monkeypatch.setattr(StreamTrainer, "training_step", notes_ages)
    run(recipe({"carry": 1.0}))
    # two steps of one segment, then of four
    assert ages == [(1, 1), (1, 2), (4, 4), (4, 8), (4, 12), (4, 16)]


def test_gradient_checkpointing_computes_the_same(recipe, tmp_path: Path) -> None:
    plain = weights(run(recipe({"max_steps": 3}, output=tmp_path / "plain")))
    training = TRAINING | {"gradient_checkpointing": True}
    saving = weights(run(recipe({"max_steps": 3, "training": training}, output=tmp_path / "saving")))
    assert all(torch.allclose(plain[name], saving[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj", "down_proj"]}])
def test_the_diagonal_order_trains_the_same(recipe, tmp_path: Path, lora) -> None:
    head = {"tasks": {"qa1": 0.5, "qa2": 0.5}, "topic_layer": 1, "inference_weight": 0.5, "inference_layer": 0}
    head |= {"begun_weight": 0.5}
    in_order, diagonal = (
        weights(run(recipe(head | {"schedule": schedule}, output=tmp_path / schedule, lora=lora)))
        for schedule in ("sequential", "diagonal")
    )
    assert all(torch.allclose(in_order[name], diagonal[name], atol=1e-5) for name in in_order)


@pytest.mark.parametrize(("name", "value"), [("truncate", 2), ("carry", 0.5), ("size_weight", 0.1)])
def test_the_diagonal_order_of_stretches_is_refused_by_the_recipe(recipe, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"'diagonal' and `{name}` {value}.*Leave `{name}` out"):
        recipe({"schedule": "diagonal", name: value})


def test_a_weight_of_memories_that_a_model_does_not_have_is_refused(recipe, tmp_path: Path, books: Path) -> None:
    bare = make_fresh(Fresh(**FRESH, memory=False), tmp_path / "bare", 32, books, seed=1)
    with pytest.raises(ValueError, match=r"`size_weight` is 0.1, but no layer .* has an associative memory"):
        run(recipe({"size_weight": 0.1}, model=bare))


def test_a_size_weight_keeps_memories_small(recipe, tmp_path: Path) -> None:
    # streams of one segment are whole, those of four are cut into two
    def size(weight: float) -> float:
        directory = run(recipe({"size_weight": weight, "truncate": 2}, output=tmp_path / str(weight)))
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.inference_mode():
            memories = model(torch.arange(256).view(1, -1), use_cache=True).past_key_values.M
        return sum(M.norm().item() for M in memories.values())

    # a model from nothing writes zeros, so what there is was learnt
    assert 0 < size(1000.0) < 0.7 * size(0.0)


def test_inferences_of_a_task_without_any_are_refused_by_the_recipe(recipe) -> None:
    with pytest.raises(ValueError, match=r"`inference_weight` is 0.2, but nothing is inferred in qa1.*one of qa2, qa3"):
        recipe({"inference_weight": 0.2})


def test_an_auxiliary_head_on_a_layer_that_is_not_there_is_refused(recipe) -> None:
    with pytest.raises(ValueError, match=r"head for 'inferences' is to read layer 2, but .* the layers 0 to 1"):
        run(recipe({"tasks": {"qa2": 1.0}, "inference_weight": 0.2, "inference_layer": 2}))


def test_the_diagonal_order_of_a_model_that_is_cut_up_is_refused(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = StreamTrainer.create_accelerator_and_postprocess

    def prepare_for_fsdp(self) -> None:
        prepare(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(StreamTrainer, "create_accelerator_and_postprocess", prepare_for_fsdp)
    with pytest.raises(ValueError, match="FSDP cuts them up"):
        run(recipe({"schedule": "diagonal"}))


def test_adapters_beside_positions_of_memory_tokens_are_refused() -> None:
    base = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    model = RMTForCausalLM.from_base(base, 32, 2, wrap_pos=True)
    with pytest.raises(ValueError, match=r"positions of their own \(`wrap_pos`\).*Train without `lora`"):
        Adapters(model, {"target_modules": ["c_attn"]})


def test_adapters_train_the_memory_whole_and_are_merged(recipe) -> None:
    one = recipe(lora={"r": 2, "target_modules": ["q_proj", "down_proj"]})
    after, before = weights(run(one)), weights(one.model)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        trained = "memory" in name or ".W_m" in name or "q_proj" in name or "down_proj" in name
        assert torch.equal(after[name], tensor) != trained, name
    delta = after["model.model.layers.0.layer.self_attn.q_proj.weight"]
    delta = delta - before["model.model.layers.0.layer.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(delta, atol=1e-5) == 2


def test_adapters_go_on_where_they_stopped(recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"]}
    whole = weights(run(recipe(output=tmp_path / "whole", lora=lora)))
    step = StreamTrainer.training_step

    def breaks_off(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StreamTrainer, "training_step", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(lora=lora))
    monkeypatch.setattr(StreamTrainer, "training_step", step)
    resumed = weights(run(recipe(lora=lora)))
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)


def test_another_recipe_is_not_mixed_in(recipe) -> None:
    run(recipe({"max_steps": 1}))
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        run(recipe({"max_steps": 2}))


def test_a_run_goes_on_with_fields_that_came_after_it_began(recipe, tmp_path: Path) -> None:
    run(recipe({"max_steps": 1}))
    file = tmp_path / "run" / "recipe.json"
    told = json.loads(file.read_text())
    del told["stages"][0]["schedule"]
    file.write_text(json.dumps(told))
    run(recipe({"max_steps": 1}))
    assert json.loads(file.read_text())["stages"][0]["schedule"] == "sequential"
    file.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        run(recipe({"max_steps": 1, "schedule": "diagonal"}))


def test_a_fresh_model_begins_as_the_recipe_says(start: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(start)
    words = {word for task in TASKS.values() for word in (*task.labels, *task.topics)}
    assert [word for word in words if len(tokenizer(f" {word}").input_ids) > 1] == []
    for memory in (True, False):
        model = make_model(Fresh(**FRESH, memory=memory), tokenizer, 32, seed=1)
        layers = model.model.model.layers
        assert [hasattr(layer, "W_mq") for layer in layers] == [memory] * 2
        attention = layers[0].layer.self_attn
        assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
        assert attention.o_proj.weight.std().item() == pytest.approx(0.5 * 32**-0.5, rel=0.1)
        assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.15, rel=0.05)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    first = make_model(Fresh(**FRESH), tokenizer, 32, seed=1).model.model.layers[1]
    assert torch.equal(first.W_mq.weight, first.W_mk.weight)
    assert first.W_mq.weight.std().item() == pytest.approx(4 * 32**-0.5, rel=0.1)
    assert first.W_mv.weight.abs().max() == 0
    apart = make_model(Fresh(**FRESH, tie_queries=False), tokenizer, 32, seed=1)
    assert not torch.equal(apart.model.model.layers[0].W_mq.weight, apart.model.model.layers[0].W_mk.weight)


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_the_recipes_are_read(file: Path) -> None:
    recipe = Recipe.read(file)
    assert recipe.stages
    assert all(name in TASKS for stage in recipe.stages for name in stage.tasks)
    assert Recipe.read(file, output=Path("/elsewhere"), seed=7).seed == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fresh": None}, "`model` .a directory. or `fresh`"),
        ({"speed": 1}, "speed"),
        ({"stages": [STAGE | {"tasks": "qa1"}]}, "tasks"),
        (
            {"fresh": {"memory": False}, "stages": [STAGE | {"size_weight": 0.1}]},
            "`size_weight` of stage first weighs memories, but `memory` of `fresh` is false",
        ),
        ({"background": None}, "`mentions` of stage first are sentences of the background, which is null"),
        (
            {"background": None, "stages": [STAGE | {"mentions": 0.0, "overrun": 0.5}]},
            "`overrun` of stage first goes on with text of the background, which is null",
        ),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, change, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output": "out", "fresh": {}, "stages": [STAGE]} | change))
    with pytest.raises(ValueError, match=message):
        Recipe.read(file)


def test_defaults_stand_in_every_stage(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    own = {"name": "b", "max_steps": 9, "training": {"learning_rate": 2.0}}
    stages = [{"name": "a"}, own]
    defaults = {k: v for k, v in STAGE.items() if k != "name"}
    file.write_text(yaml.safe_dump({"output": "out", "fresh": {}, "stage_defaults": defaults, "stages": stages}))
    first, second = Recipe.read(file).stages
    assert (first.max_steps, second.max_steps) == (6, 9)
    assert first.training == TRAINING
    assert second.training == TRAINING | {"learning_rate": 2.0}


def test_a_recipe_can_be_like_another(tmp_path: Path) -> None:
    file, other = tmp_path / "recipe.yaml", tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"output": "out", "fresh": {}, "seed": 3, "stages": [STAGE]}))
    changed = {"max_steps": 9, "training": {"learning_rate": 2.0}}
    file.write_text(yaml.safe_dump({"like": "other.yaml", "output": "else", "in_every_stage": changed}))
    recipe = Recipe.read(file)
    assert (recipe.output, recipe.seed) == (Path("else"), 3)
    assert recipe.stages[0] == Recipe.read(other).stages[0].model_copy(
        update={"max_steps": 9, "training": TRAINING | {"learning_rate": 2.0}}
    )

"""Trains a model by a recipe: `python -m examples.train.run RECIPE.yaml`.

Run it again to go on where it stopped. In the recipe's `output` it leaves `start/` (the model it began with), one
directory a stage (checkpoints while it runs, then `model/` and what it reached in `result.json`), and `model/`, the
result: an ordinary Hugging Face directory with a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from examples.texts import fetched
from examples.train.adapters import Adapters
from examples.train.batches import Batches
from examples.train.curriculum import Curriculum
from examples.train.forward import HEADS
from examples.train.fresh import make_fresh
from examples.train.recipe import Recipe, Stage
from examples.train.streams import Streams, classes
from examples.train.trainer import StreamTrainer
from examples.train.validation import validate
from vllm_armt.babilong import Background, Split
from vllm_armt.hf import RecurrentForCausalLM

RESULT = "result.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    args = parser.parse_args()
    print(run(Recipe.read(args.recipe, output=args.output, seed=args.seed)))


def run(recipe: Recipe) -> Path:
    """Train all that is not trained yet, and return the directory of the result.

    Raises:
        ValueError: the output directory holds a run of another recipe.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    output = recipe.output.expanduser()
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.main_process_first():
        start = _prepare(recipe, output)
    for i, stage in enumerate(recipe.stages):
        directory = output / f"{i + 1}-{stage.name}"
        if not (directory / RESULT).exists():
            train(recipe, stage, start, directory)
        state.wait_for_everyone()
        start = directory / "model"
    result = output / "model"
    if state.is_main_process and not result.exists():
        shutil.copytree(start, result)
    return result


def train(recipe: Recipe, stage: Stage, start: Path, directory: Path) -> None:
    """Train one stage from the model in `start`, or from its last checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    config = AutoConfig.from_pretrained(start)
    config.segment_size = stage.segment_size
    model: RecurrentForCausalLM = AutoModelForCausalLM.from_pretrained(
        start, config=config, dtype=getattr(torch, recipe.dtype)
    )
    set_seed(recipe.seed)
    adapters = Adapters(model, recipe.lora) if recipe.lora is not None else None
    if stage.heads:
        size, names = config.get_text_config().hidden_size, classes(stage.tasks)
        heads = {kind: nn.Linear(size, len(names[kind]), dtype=model.dtype) for kind in stage.heads}
        model.add_module(HEADS, nn.ModuleDict(heads))

    def streams(part: Split) -> Streams:
        folder = recipe.background and recipe.background / part
        text = Background.of_directory(folder, tokenizer, recipe.whitespace) if folder else None
        return Streams(tokenizer, text, stage.tasks, part)

    curriculum = Curriculum(stage)
    arguments = _arguments(recipe, stage, directory)
    seed, device, devices = f"{recipe.seed}/{stage.name}", arguments.process_index, arguments.world_size
    batches = Batches(streams("train"), stage, curriculum, seed, device, devices)
    trainer = StreamTrainer(model, arguments, stage, batches, curriculum)
    begun = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(directory) if directory.exists() else None)
    seconds = time.perf_counter() - begun
    if stage.heads:
        delattr(model, HEADS)
    if adapters is not None:
        model = adapters.merge()
    if trainer.is_world_process_zero():
        model.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
        result = {
            "steps": curriculum.step,
            "level": stage.levels[curriculum.level].segments,
            "accuracy": curriculum.accuracy,
            "seconds_since_start_or_resume": round(seconds),
            "validation": validate(model, streams("validation"), stage, recipe.validation),
            "log": [line for line in trainer.state.log_history if "loss" in line],
        }
        (directory / RESULT).write_text(json.dumps(result, indent=1) + "\n")
        print(f"{directory.name}: {json.dumps({k: v for k, v in result.items() if k != 'log'})}", flush=True)


def _arguments(recipe: Recipe, stage: Stage, directory: Path) -> TrainingArguments:
    """transformers' arguments: those of the stage, over defaults that suit streams."""
    ours: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": stage.max_steps,
        "seed": recipe.seed,
        "logging_steps": 50,
        "save_steps": 200,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # batches know where they are: none need be drawn again to get there
        "ignore_data_skip": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    return TrainingArguments(**ours | stage.training)


def _prepare(recipe: Recipe, output: Path) -> Path:
    """Make what is trained and what it is trained on, and return the model's directory."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "recipe.json"
    if file.exists() and recipe != _recipe_told(file, recipe):
        raise ValueError(f"{output} holds a run of another recipe ({file.name}). Choose another --output.")
    told = json.loads(recipe.model_dump_json(exclude={"output", "threads"}))
    file.write_text(json.dumps(told, indent=1) + "\n")
    if recipe.background is not None:
        fetched(recipe.background)
    if recipe.fresh is not None:
        segment_size = recipe.stages[0].segment_size
        return make_fresh(recipe.fresh, output / "start", segment_size, recipe.background, recipe.seed)
    assert recipe.model is not None
    return recipe.model.expanduser()


def _recipe_told(file: Path, recipe: Recipe) -> Recipe:
    """The recipe of an earlier run; fields that are newer than it stand at their defaults."""
    return Recipe(output=recipe.output, threads=recipe.threads, **json.loads(file.read_text()))


if __name__ == "__main__":
    main()

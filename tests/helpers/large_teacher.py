"""A teacher of 8B parameters as far as a plan reads it: the config of Llama 3.1 8B and the header of its weights, in a sparse
file that takes no space, with the tokenizer of the tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers import tiny
from transformers import AutoModelForCausalLM, LlamaConfig

from minitron.architecture.published import BASES

RECIPE = "llama-3.1-8b-to-4b-h100x8"


def make_teacher(folder: Path) -> Path:
    """Write the teacher, and a text beside it; returns the folder of the teacher."""
    base = BASES["Llama 3.1 8B"]
    config = LlamaConfig(
        num_hidden_layers=base["num_layers"],
        hidden_size=base["hidden_size"],
        intermediate_size=base["intermediate_size"],
        num_attention_heads=base["num_heads"],
        num_key_value_heads=base["num_kv_heads"],
        vocab_size=base["vocab_size"],
        max_position_embeddings=131_072,
        dtype="bfloat16",
    )
    teacher = folder / "teacher"
    config.save_pretrained(teacher)
    tiny.tokenizer().save_pretrained(teacher)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header, size = {}, 0
    for name, tensor in model.state_dict().items():
        end = size + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    with open(teacher / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    tiny.corpus(folder / "text.jsonl")
    return teacher


def settings(teacher: Path) -> list[str]:
    """Overrides of `RECIPE` with which it reads the teacher and its text from files, and needs no benchmark."""
    return [
        f"teacher.model={teacher}",
        "data.kind=jsonl",
        f"data.path={teacher.parent / 'text.jsonl'}",
        "data.name=null",
        "calibrate.layers=loss",
        "calibrate.task=null",
        "evaluate.tasks=[]",
    ]

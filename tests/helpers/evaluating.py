"""A byte-level tokenizer, random models, and documents for benchmarks."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 257
WORDS = ["river", "stone", "light", "engine", "garden", "winter", "paper", "signal", "copper", "bridge", "window"]


def tiny_model(seed: int, **changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # large, so that choices differ clearly
        "tie_word_embeddings": False,
        "attention_dropout": 0.5,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings | changes))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {letter: number for number, letter in enumerate(alphabet, start=1)}
    byte_level = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<end>")


def arc_documents(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "id": str(number),
            "question": f"Which {draw.choice(WORDS)} has a {draw.choice(WORDS)}?",
            "choices": {"text": [" ".join(draw.sample(WORDS, n)) for n in (1, 2, 3, 1)], "label": ["A", "B", "C", "D"]},
            "answerKey": draw.choice("ABCD"),
        }
        for number in range(count)
    ]


def pages(count: int, words: int) -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [{"page": " ".join(draw.choices(WORDS, k=words + number))} for number in range(count)]


def sums(count: int) -> list[dict[str, Any]]:
    draw = random.Random(5)
    return [
        {
            "question": f"How many {draw.choice(WORDS)}s are {n} and {n + 1}?",
            "answer": f"{n} + {n + 1}\n#### {2 * n + 1}",
        }
        for n in range(count)
    ]


def write_jsonl(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def results_of_lm_eval(model: Any, tokenizer: Any, definition: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What lm-eval itself finds for a model in memory and the definition of a task."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    scorer = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1, softmax_dtype="float32")
    manager = TaskManager(include_defaults=False)
    # which runs pip and other programs to describe the machine
    with patch.object(evaluator, "add_env_info"):
        results: dict[str, Any] = evaluator.simple_evaluate(
            scorer, tasks=[definition], bootstrap_iters=0, task_manager=manager, **settings
        )
    return results

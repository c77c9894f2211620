"""Small but real models, tokenizers and texts for tests."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from minitron.architecture import Architecture
from minitron.importance import ImportanceScores

logging.set_verbosity_error()

DENSE = ("llama", "mistral", "qwen2", "qwen3", "nemotron", "gemma2", "gemma3_text", "phi3")
MIXTURES = ("mixtral", "qwen3_moe")
FAMILIES = (*DENSE, *MIXTURES)
TEXT = """the model reads a row of tokens and predicts next one from all before it small large teacher student layer head
neuron channel loss rate batch step search prune keep remove learn text word line page book river stone cloud tree"""
WORDS = TEXT.split()
SEARCH_STEPS, DISTILL_STEPS = 6, 24


# Settings of each family besides the common ones: small sliding windows, noticeable soft-capping, a few experts.
GEMMA = {
    "sliding_window": 5,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
}
OWN: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "sliding_window_pattern": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
}


def config(family: str, tied: bool, **changes: Any) -> Any:
    """A transformers config of a family: grouped-query attention, explicit head_dim, biases where the family has them.

    A value of None in `changes` means the default of transformers.
    """
    from transformers import AutoConfig

    values = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "tie_word_embeddings": tied,
        "attention_bias": True,
        "mlp_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    values |= {**OWN.get(family, {}), **changes}
    if family == "qwen3_moe":
        values["moe_intermediate_size"] = values["intermediate_size"]
    return AutoConfig.for_model(family, **{name: value for name, value in values.items() if value is not None})


def from_config(settings: Any) -> torch.nn.Module:
    """A model of a transformers config, with transformers' random weights."""
    # eager, because the faster implementations of experts do not support float64
    return AutoModelForCausalLM.from_config(settings, experts_implementation="eager")


def model(family: str = "llama", tied: bool = True, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A float32 model in which all weights, norms and biases included, are random, so that no slicing error is hidden."""
    torch.manual_seed(seed)
    made = from_config(config(family, tied, **changes)).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return made


def longrope_model(short_length: int) -> torch.nn.Module:
    """A model whose rotary embeddings have other factors in texts of more than `short_length` tokens."""
    lengths = {"max_position_embeddings": 256, "original_max_position_embeddings": short_length}
    return model("phi3", rope_parameters=dict(LONGROPE), head_dim=None, **lengths)


def architecture(of: torch.nn.Module) -> Architecture:
    return Architecture.from_config(of.config)


def scores(of: Architecture, seed: int = 2) -> ImportanceScores:
    """Random importance scores for an architecture: enough for tests of slicing, not of what is kept."""
    draw = torch.Generator().manual_seed(seed)
    layers, experts = of.num_layers, (of.num_experts,) if of.num_experts else ()
    return ImportanceScores(
        heads=torch.rand(layers, of.num_heads, generator=draw),
        neurons=torch.rand(layers, *experts, of.intermediate_size, generator=draw),
        channels=torch.rand(of.hidden_size, generator=draw),
        similarity=torch.rand(layers + 1, layers + 1, generator=draw),
        experts=torch.rand(layers, *experts, generator=draw) if experts else None,
    )


def rows(count: int = 8, seq_length: int = 16, vocab: int = 300, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, (count, seq_length), generator=torch.Generator().manual_seed(seed))


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of common words with enough structure for a model to learn something."""
    draw = random.Random(seed)
    return [
        " ".join(WORDS[(draw.randrange(7) * 11 + 5 * i) % len(WORDS)] for i in range(draw.randrange(30, 80)))
        for _ in range(count)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts(50), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", bos_token="<eos>")


def checkpoint(folder: Path) -> Path:
    """Save a teacher worth distilling, with its tokenizer; see `_trained`."""
    trained, words = _trained()
    trained.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@functools.cache
def _trained() -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A Llama that was briefly trained on `texts`, and its tokenizer: once for all tests of a process."""
    words = tokenizer()
    made = model(
        "llama", tied=True, vocab_size=len(words), hidden_size=48, num_attention_heads=6, num_key_value_heads=2
    )
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    ids = torch.tensor([i for text in texts(200) for i in [*words(text)["input_ids"], words.eos_token_id]])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for step in range(60):
        batch = ids[(torch.arange(16) + 16 * step) % len(ids)]
        made(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval(), words


def corpus(path: Path, count: int = 400) -> Path:
    """Write `texts` as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(count, seed=3)))
    return path


def bench(folder: Path) -> Path:
    """Fill a folder with a small trained teacher, a text, a benchmark, and the recipe that uses them."""
    checkpoint(folder / "teacher")
    corpus(folder / "text.jsonl")
    with open(folder / "arc.jsonl", "w") as file:
        for number, text in enumerate(texts(12, seed=7)):
            words = text.split()
            choices = {"text": [words[8], "stone cloud", "river river"], "label": ["A", "B", "C"]}
            line = {"id": str(number), "question": " ".join(words[:8]), "choices": choices, "answerKey": "A"}
            file.write(json.dumps(line) + "\n")
    training = {"batch_rows": 4, "micro_batch_rows": 2, "peak_lr": 2e-3, "min_lr": 1e-4, "warmup_steps": 2}
    recipe = {
        "name": "tiny-cpu",
        "description": "a small teacher for tests",
        "experiment": "tiny",
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "data": {
            "kind": "jsonl",
            "path": str(folder / "text.jsonl"),
            "seq_length": 32,
            "train_rows": 96,
            "heldout_rows": 16,
        },
        "calibrate": {"rows": 16, "layers": "loss", "layer_rows": 4},
        "family": [
            {
                "model": "tiny-student",
                "parameters": 80_000,
                "tolerance": 0.3,
                "space": {"num_layers": [3, 4, 5], "hidden_size": [36, 48], "intermediate_size": [48, 72, 96]},
            }
        ],
        "search": {"training": {"steps": SEARCH_STEPS, "checkpoint_every": 2, **training}},
        "distill": {"steps": DISTILL_STEPS, "checkpoint_every": 4, **training},
        "evaluate": {"tasks": [{"name": "arc_easy", "data": str(folder / "arc.jsonl"), "limit": 10}]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder

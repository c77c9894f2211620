"""A checkpoint's identity, independent of who wrote it and where: its weights, and the meaning of config and tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from minitron.architecture import Architecture
from minitron.checkpoints.headers import read_headers
from minitron.sharded_tensors import whole
from minitron.storage import fingerprint

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

# Fields of the families' configs that do not influence the outputs.
NOT_THE_OUTPUTS = (
    *("use_cache", "initializer_range", "pretraining_tp", "output_router_logits", "router_aux_loss_coef"),
    # the tokenizer's are used, except for text that is written, see `generation_settings`
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
NOT_THE_TEXT = ("use_cache", "output_attentions", "output_hidden_states", "transformers_version")  # generation settings
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors spells them
HEAD = "lm_head.weight"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def checkpoint_identity(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides a checkpoint's outputs on text, 16 hexadecimal digits: the values of its weights, the
    config fields that the model computes with, and how its tokenizer turns text into ids.

    Not included: the split into files, versions, paths, chat templates, `generation_settings`, and the machine that wrote it.
    """
    from minitron.checkpoints.reading import read_config

    config = read_config(str(folder), str(folder), trust_remote_code=False, local_files_only=True)
    return _identity(weights_identity(folder), config, tokenizer)


def model_identity(model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The `checkpoint_identity` that a loaded model has when it is saved as it is, in its dtype. All processes of a model that
    is split over them call this alike."""
    hashed = hashlib.sha256()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    for name, tensor in sorted(model.state_dict().items()):
        if head is embedding and name == HEAD:
            continue  # a tied head is not saved
        hashed.update(repr((name, DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))).encode())
        hashed.update(whole(tensor).detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return _identity(hashed.hexdigest(), model.config, tokenizer)


def _identity(weights: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    from minitron.data import tokenizer_identity

    return fingerprint(
        {
            "weights": weights,
            "config": config_meaning(config),
            "tokenizer": tokenizer_identity(tokenizer),
            "special": {name: getattr(tokenizer, name, None) for name in SPECIAL},
        }
    )


def generation_settings(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What, besides `model_identity`, decides the text that a model writes: the tokens that end it, penalties and the like of
    its generation config, and how the tokenizer turns ids into text; a JSON value."""
    values = json.loads(config.to_json_string())
    return {
        "config": {name: value for name, value in values.items() if name[0] != "_" and name not in NOT_THE_TEXT},
        "clean_up": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
    }


def weights_identity(folder: Path) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every tensor of a checkpoint, in the order of names, hexadecimal."""
    whole = hashlib.sha256()
    for name, header in sorted(read_headers(folder).items()):
        whole.update(repr((name, header.dtype, header.shape)).encode())
        with safe_open(str(folder / header.file), "pt") as file:  # per tensor, so that its pages are released with it
            tensor = file.get_tensor(name)
            whole.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def config_meaning(config: PretrainedConfig) -> dict[str, Any]:
    """The architecture, and the fields that the family's config class defines itself, such as the norms' epsilon, RoPE and
    windows, set or by default; not the fields of every config, and no unknown ones."""
    from transformers import PretrainedConfig

    own = type(config)().to_dict().keys() - PretrainedConfig().to_dict().keys() - set(NOT_THE_OUTPUTS)
    values = config.to_dict()
    return {
        "architecture": Architecture.from_config(config).to_dict(),
        "settings": {name: values[name] for name in sorted(own & values.keys()) if name[0] != "_"},
    }

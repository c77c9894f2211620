"""Configs and other files of a checkpoint as transformers reads them, with one sentence about what is wrong with them."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from minitron.arguments import short_repr
from minitron.checkpoints.gguf_config import complete_config
from minitron.checkpoints.gguf_header import GgufHeader, check_gguf
from minitron.checkpoints.limits import CONFIG_BYTES, check_limits
from minitron.errors import InputError
from minitron.files import is_special

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What transformers and the libraries that it reads files with raise for damaged or unusual ones.
READ_ERRORS = (
    *(OSError, ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError, ZeroDivisionError),
    *(AssertionError, ImportError, EOFError, OverflowError, pickle.UnpicklingError, SafetensorError),
    StrictDataclassError,
)
ACTIVATIONS = ("hidden_act", "hidden_activation")  # transformers' names, by family
SIZES = (  # keys of config.json whose values are at least 1
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "max_position_embeddings", "moe_intermediate_size"),
)
ROPE_TEXTS = ("rope_type", "type")  # entries of rope_parameters that are not numbers
CORRECT = "correct it in config.json, or use the config.json that the checkpoint was saved with"
COMPLETE = "give a complete checkpoint folder, a .gguf file, or a hub name that this machine can reach"
LONGEST_REASON = 250
LFS_START = b"version https://git-lfs.github.com/spec/"
LFS_BYTES = 1024  # a pointer has about 130


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and warnings of transformers and the hub while a model is loaded or saved."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # transformers imports torchao where it is installed, which warns of its own use of torch
    pytree = getLogger("torch.utils._pytree")
    level = pytree.level
    pytree.setLevel(ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader's progress bar cannot be disabled
            yield
    finally:
        pytree.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def readable(what: str, remedy: str = COMPLETE) -> Iterator[None]:
    """Raise InputError, with the reason in one line, for what transformers raises inside the block.

    what: the subject of the sentence "... cannot be read".
    """
    try:
        yield
    except Exception as error:
        # tokenizers, which is written in Rust, raises Exception itself
        if type(error) is not Exception and not isinstance(error, READ_ERRORS):
            raise
        raise InputError(f"{what} cannot be read ({reason_of(error)})", remedy) from error


def reason_of(error: Exception) -> str:
    """The reason that transformers gives, as one line of at most `LONGEST_REASON` characters."""
    if isinstance(error, pickle.UnpicklingError):
        return "a .bin file is damaged or contains more than tensors, which could be code"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # huggingface_hub's errors about a field of a config have the field's name in the first line and the reason in the last
    line = lines[-1].split("Error: ", 1)[-1] if isinstance(error, StrictDataclassError) else lines[0]
    if isinstance(error, KeyError | AttributeError | TypeError):
        line = f"{type(error).__name__}: {line}"
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "…"


def read_config(folder: str, where: str, **arguments: Any) -> PretrainedConfig:
    """The config of a checkpoint folder, a hub model or, with the argument `gguf_file`, a GGUF file.

    where: its name in errors. Raises InputError for a config that transformers cannot read, and for values with which the model
    could not be built or run. Sizes are checked before transformers builds anything from them.
    """
    from transformers import AutoConfig, PretrainedConfig

    is_folder = "gguf_file" not in arguments and Path(folder).is_dir()
    header = check_gguf(Path(folder, arguments["gguf_file"])) if "gguf_file" in arguments else None
    if is_folder:
        _check_bytes(Path(folder, "config.json"))
    subject, remedy = (f"{where}: config.json", CORRECT) if is_folder else (f"{where!r}", COMPLETE)
    with readable(subject, remedy), quiet_transformers():
        if header is None:
            values, _ = PretrainedConfig.get_config_dict(folder, **arguments)
            _check_values(values, where)
            check_limits(values, where)
        config: PretrainedConfig = (
            copy.deepcopy(_gguf_config(header)) if header else AutoConfig.from_pretrained(folder, **arguments)
        )
        if header:
            complete_config(config, header, where)
    check_config(config, where)
    return config


@lru_cache(maxsize=1)
def _gguf_config(header: GgufHeader) -> PretrainedConfig:
    """The config of a GGUF file, which takes seconds to read because of the vocabulary."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(
        header.path.parent, gguf_file=header.path.name, trust_remote_code=False
    )
    return config


def _check_bytes(file: Path) -> None:
    if file.is_file() and file.stat().st_size > CONFIG_BYTES:
        raise InputError(f"{file}: {file.stat().st_size:,} bytes are too many for a config", COMPLETE)


def _check_values(values: Any, where: str) -> None:
    """Raise InputError for entries of a config.json for which transformers has no message of its own."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: config.json is not an object of keys and values", CORRECT)
    for name in ("dtype", "torch_dtype"):
        dtype = values.get(name)
        known = getattr(torch, str(dtype), None)
        if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
            raise InputError(
                f"{where}: config.json: {name}: {short_repr(dtype)} is not a floating-point dtype of torch",
                "delete the key: the weights have their dtype in their own files",
            )
    attention = values.get("_attn_implementation")  # without the underscore it is replaced when the model is loaded
    if attention not in (None, "sdpa", "eager"):
        raise InputError(
            f"{where}: config.json: _attn_implementation: {short_repr(attention)} depends on the machine, not on the model",
            "delete the key",
        )
    for name in SIZES:
        size = values.get(name)
        if isinstance(size, int) and not isinstance(size, bool) and size < 1:
            raise InputError(f"{where}: config.json: {name}: {size} is not a valid size", CORRECT)
    for name, value in values.items():
        inner = value if isinstance(value, dict) else {"": value}  # such as rope_parameters
        for key, number in inner.items():
            if isinstance(number, float) and not math.isfinite(number):
                full = f"{name}.{key}" if key else name
                raise InputError(f"{where}: config.json: {full}: {number} is not a finite number", CORRECT)
    for name in ("quantization_config", "rope_parameters", "rope_scaling"):
        if not isinstance(values.get(name), dict | None):
            raise InputError(f"{where}: config.json: {name}: {short_repr(values[name])} is not a section", CORRECT)


def check_config(config: PretrainedConfig, where: str) -> None:
    """Raise InputError for values of a config with which the model could not be built or run."""
    from transformers.activations import ACT2FN

    vocabulary = getattr(config, "vocab_size", None)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and isinstance(vocabulary, int) and not -vocabulary <= padding < vocabulary:
        raise InputError(
            f"{where}: config.json: pad_token_id: {padding} is outside the vocabulary of {vocabulary} tokens",
            "correct it in config.json, or delete the key",
        )
    for name in ACTIVATIONS:
        function = getattr(config, name, None)
        if isinstance(function, str) and function not in ACT2FN:
            raise InputError(
                f"{where}: config.json: {name}: transformers has no activation function {short_repr(function)}", CORRECT
            )
    for parameters in _rope_parameters(config):
        _check_rope(parameters, where)


def _rope_parameters(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """The RoPE settings of a config: one dict, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    inner = [value for value in parameters.values() if isinstance(value, Mapping)]
    return inner or [parameters]


def _check_rope(parameters: Mapping[str, Any], where: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    known = ("default", *ROPE_INIT_FUNCTIONS)
    if kind not in known:
        raise InputError(
            f"{where}: config.json: rope_type: transformers has no RoPE of type {short_repr(kind)}",
            f"use one of {', '.join(dict.fromkeys(known))}, or a newer transformers",
        )
    for name, value in parameters.items():
        numbers = value if isinstance(value, list) else [value]
        if name not in ROPE_TEXTS and not all(isinstance(number, int | float | None) for number in numbers):
            raise InputError(f"{where}: config.json: {name}: {short_repr(value)} is not a number", CORRECT)


def check_files(folder: Path) -> None:
    """Raise InputError if a file of a checkpoint folder is a pointer of Git LFS instead of the file itself, or a pipe or
    device, which may never end."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            if path.stat().st_size < LFS_BYTES and path.read_bytes().startswith(LFS_START):
                raise InputError(
                    f"{path} is a pointer of Git LFS, not the file itself",
                    f"run `git lfs pull` in {folder}, or download the model with `hf download`",
                )
        elif is_special(path):
            raise InputError(f"{path} is a pipe or device, not a file", "replace it by the file, or delete it")

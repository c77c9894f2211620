"""The checkpoint of a variant: what is checked of it, and its copy in the storage, which is found by its content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron import storage
from minitron.checkpoints.companions import check_link, companions
from minitron.checkpoints.headers import INDEX, SINGLE, check_no_adapter, read_headers
from minitron.checkpoints.quantised import method_of
from minitron.checkpoints.reading import read_config
from minitron.errors import InputError
from minitron.models import check_contents, check_source, load_source, source_tokenizer
from minitron_platform.locations import Locations
from minitron_platform.tracking.variant_tags import Kind
from minitron_platform.tracking.version_weights import CARD

UNMEASURED = (
    "measure it with another tool and add --unmeasured, which registers it without figures: a promotion then needs --force "
    "and --reason"
)


def checkpoint_folder(source: str, kind: Kind) -> Path:
    """The folder of a checkpoint of safetensors with its tokenizer. Raises InputError for anything else, and if the tensors
    of an aligned model are not those of its config; those of a quantised one are compared when it is loaded."""
    check_source(source)
    folder = storage.local_path(source)
    if not folder.is_dir():
        raise InputError(f"{source} is not a folder", "give the folder of a transformers checkpoint")
    check_no_adapter(folder)
    check_link(folder, folder / CARD)  # its text becomes part of the variant's card
    read_headers(folder)
    source_tokenizer(source)
    if kind == "aligned":
        if _quantisation(source) is not None:
            raise InputError(
                f"{source}: it is to be added as aligned, but its weights are quantised (quantization_config in config.json)",
                "add the aligned model that it was quantised from first, then this one with --kind quantised and that "
                "--parent",
            )
        check_contents(source)
    return folder


def load_variant(source: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The model, dequantised in `dtype`, and its tokenizer. Raises InputError if that is not possible here, and as
    `load_source` does."""
    try:
        method_of(_config(source), source)
    except InputError as error:
        raise InputError(error.problem, f"install the package if one is named; else {UNMEASURED}") from error
    return load_source(source, dtype=dtype)


def store(locations: Locations, folder: Path, name: str) -> str:
    """Copy a checkpoint's config, weights, tokenizer and licence to the storage, once for the model `name`, whose card is put
    beside them; returns the folder there."""
    files = {str(path.relative_to(folder)): path for path in _files(folder)}
    hashes = storage.hashes_of(files)
    content = storage.fingerprint([name, hashes])
    target = storage.join(locations.storage, "variants", content, "model")
    storage.commit_files(files, target, hashes)
    return target


def _files(folder: Path) -> list[Path]:
    weights = sorted({header.file for header in read_headers(folder).values()})
    index = [] if SINGLE in weights else [INDEX]
    return sorted({folder / name for name in ("config.json", *weights, *index)} | set(companions(folder)))


def _config(source: str) -> Any:
    return read_config(source, source, trust_remote_code=False, local_files_only=True)


def _quantisation(source: str) -> Any:
    return getattr(_config(source), "quantization_config", None)

"""Pruning of checkpoints larger than memory: folder to folder, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minitron import storage
from minitron.architecture import Architecture
from minitron.arguments import check_type
from minitron.checkpoints.companions import check_links, companions
from minitron.checkpoints.contents import check_tied, filled
from minitron.checkpoints.files import Checkpoint, ShardWriter
from minitron.checkpoints.headers import check_no_adapter, read_headers
from minitron.checkpoints.reading import read_config
from minitron.errors import InputError
from minitron.importance.scores import ImportanceScores
from minitron.models import NOT_THE_TOKENIZERS
from minitron.pruning.head_merging import merged_source
from minitron.pruning.selection import select
from minitron.pruning.slicing import sliced_tensors

TOKENIZER_CONFIG = "tokenizer_config.json"


def prune_checkpoint(
    source: str | Path,
    target: str | Path,
    architecture: Architecture,
    scores: ImportanceScores,
    *,
    layers: Sequence[int] | None = None,
    merge_heads: int = 0,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write to `target` the model that `prune` would build from the checkpoint in `source`, with little memory.

    source: the folder of a transformers checkpoint in safetensors. target: a new folder, at any address that
    `minitron.storage` supports; it is published complete or not at all. layers, merge_heads: as in `prune`. At most one shard
    of `shard_bytes`, one tensor of the original and its slice are in memory. Weights are first rounded to `dtype`, as a model
    that is loaded in it, or keep theirs; tokenizer, generation settings and licence are copied. `progress(done, total)` counts
    tensors. Raises InputError if `target` exists, if `architecture` does not fit inside the model, if the checkpoint's tensors
    are not those of the model in config.json, and for arguments of the wrong type.
    """
    address = str(target)
    if storage.exists(address):
        raise InputError(f"{address} exists", "give a new folder, or delete it")
    write_pruned(
        source,
        address,
        architecture,
        scores,
        layers=layers,
        merge_heads=merge_heads,
        dtype=dtype,
        shard_bytes=shard_bytes,
        progress=progress,
        new=True,
    )


def write_pruned(
    source: str | Path,
    address: str,
    architecture: Architecture,
    scores: ImportanceScores,
    *,
    layers: Sequence[int] | None = None,
    merge_heads: int = 0,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    new: bool = False,
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """`prune_checkpoint` to an `address` where there may be files of an earlier attempt that was not completed. new,
    before_commit: as in `minitron.storage.committed_folder`."""
    check_type("architecture", architecture, Architecture, "an Architecture")
    check_type("scores", scores, ImportanceScores, "ImportanceScores")
    if dtype is not None:
        check_type("dtype", dtype, torch.dtype, "a torch dtype")
    folder = Path(source).expanduser()
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json", "give the folder of a transformers checkpoint")
    check_links(folder)
    config = read_config(str(folder), str(folder), trust_remote_code=False, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{folder} contains quantised weights (quantization_config in config.json), which cannot be sliced",
            "use the checkpoint they were quantised from",
        )
    check_no_adapter(folder)
    base = Architecture.from_config(config)
    checkpoint = Checkpoint(folder, filled(read_headers(folder), base, str(folder)))
    check_tied(checkpoint, base)
    selection = select(scores, base, architecture, layers=layers)
    read: Callable[[str], Tensor] = checkpoint.tensor
    if dtype is not None:
        config.dtype = dtype
        read = partial(_rounded, checkpoint, dtype)
    if merge_heads:
        read = merged_source(read, base, architecture, selection, scores, merge_heads)
    total = len(base.outer_parameters) + architecture.num_layers * len(base.layer_parameters)
    note = {"architecture": architecture.to_dict(), "layers": selection.layers, "scores": scores.provenance}
    with storage.committed_folder(address, note, new=new, before_commit=before_commit) as staging:
        writer = ShardWriter(staging, shard_bytes)
        for done, (name, tensor) in enumerate(sliced_tensors(read, base, architecture, selection), start=1):
            for stored, part in checkpoint.stored(name, tensor):
                writer.add(stored, part)
            if progress:
                progress(done, total)
        writer.close()
        architecture.to_config(config, selection.layers).save_pretrained(str(staging))
        _copy(folder, staging)


def _rounded(checkpoint: Checkpoint, dtype: torch.dtype, name: str) -> Tensor:
    return checkpoint.tensor(name).to(dtype)


def _copy(source: Path, target: Path) -> None:
    for file in companions(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    settings = target / TOKENIZER_CONFIG
    if settings.exists():
        values = storage.read_json(str(settings))
        kept = {name: value for name, value in values.items() if name not in NOT_THE_TOKENIZERS}
        if kept != values:
            settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")

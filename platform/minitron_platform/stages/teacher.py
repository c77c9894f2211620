"""Teacher: bring the model into one plain safetensors checkpoint, named by what it does."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.checkpoints.identity import checkpoint_identity
from minitron.data import document_tokens
from minitron.device import compute_dtype
from minitron.models import load_source, load_tokenizer, save_model, source_identity
from minitron_platform.stages.context import Context

VERSION = 2  # 2: the id is that of what the teacher does, its tensors are known to fill it, and what begins a document is said


def inputs(context: Context) -> dict[str, Any]:
    teacher = context.recipe.teacher
    return {
        "source": source_identity(teacher.model, teacher.revision),
        "dtype": str(compute_dtype(teacher.dtype)).removeprefix("torch."),
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    from transformers import AutoConfig

    teacher = context.recipe.teacher
    target = storage.join(folder, "model")
    dtype = compute_dtype(teacher.dtype)
    if not storage.is_committed(target):
        context.console.status(f"reading {teacher.model}")
        model, words = load_source(teacher.model, teacher.revision, dtype)
        context.console.status("writing it as safetensors")
        with storage.committed_folder(target) as place:
            save_model(model, words, place)
    files = storage.manifest(target)["files"]
    weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    context.console.status("hashing its weights")
    local = storage.fetch(target)
    architecture = Architecture.from_config(AutoConfig.from_pretrained(str(local), trust_remote_code=False))
    tokenizer = load_tokenizer(local)
    return {
        "folder": target,
        "id": checkpoint_identity(local, tokenizer),
        "sha256": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "architecture": architecture.to_dict(),
        "parameters": architecture.num_parameters,
        "document": asdict(document_tokens(tokenizer)),
        "summary": f"{architecture.num_parameters / 1e6:.1f}M parameters · {architecture}",
    }

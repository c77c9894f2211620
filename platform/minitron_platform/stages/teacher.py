"""Teacher: bring the model into one plain safetensors checkpoint, named by its content."""

from __future__ import annotations

from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.device import compute_dtype
from minitron.models import load_source, save_model, source_identity
from minitron_platform.context import Context

VERSION = 1


def inputs(context: Context) -> dict[str, Any]:
    teacher = context.recipe.teacher
    return {
        "source": source_identity(teacher.model, teacher.revision),
        "dtype": str(compute_dtype(teacher.dtype)).removeprefix("torch."),
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    teacher = context.recipe.teacher
    target = storage.join(folder, "model")
    dtype = compute_dtype(teacher.dtype)
    if not storage.is_committed(target):
        context.console.status(f"reading {teacher.model}")
        model, tokenizer = load_source(teacher.model, teacher.revision, dtype)
        context.console.status("writing it as safetensors")
        with storage.committed_folder(target) as place:
            save_model(model, tokenizer, place)
    files = storage.manifest(target)["files"]
    weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    architecture = _architecture(target)
    return {
        "folder": target,
        # also what else decides its outputs: norms' epsilon, RoPE, the tokenizer
        "id": storage.fingerprint({name: entry["sha256"] for name, entry in files.items() if _decides(name)}),
        "sha256": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "architecture": architecture.to_dict(),
        "parameters": architecture.num_parameters,
        "summary": f"{architecture.num_parameters / 1e6:.1f}M parameters · {architecture}",
    }


def _decides(name: str) -> bool:
    return name.endswith((".safetensors", ".model")) or name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )


def _architecture(folder: str) -> Architecture:
    from transformers import AutoConfig

    return Architecture.from_config(AutoConfig.from_pretrained(str(storage.fetch(folder)), trust_remote_code=False))

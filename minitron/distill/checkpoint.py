"""Training checkpoints: a step is committed whole or does not exist, and a damaged one is passed over by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron import storage
from minitron.errors import StorageError

log = logging.getLogger(__name__)
FILE_BYTES = 256 << 20  # safetensors copies what it writes, so one file's worth is the memory that saving takes


def save_checkpoint(folder: str, step: int, tensors: dict[str, Tensor], *, note: dict[str, Any], keep: int = 2) -> None:
    """Commit `tensors` as the state after `step` steps, in place of what is there, then delete all but the newest `keep`.

    `note["key"]` names what is trained; a checkpoint of something else is never resumed from.
    """
    storage.remove(_path(folder, step))  # a damaged one that was passed over
    with storage.committed_folder(_path(folder, step), note=note) as place:
        for number, names in enumerate(_files(tensors)):
            save_file({name: tensors[name] for name in names}, str(Path(place) / f"state-{number:05d}.safetensors"))
    for old in committed_steps(folder)[:-keep]:
        storage.remove(_path(folder, old))


def load_checkpoint(folder: str, *, key: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(note, tensors) of the newest checkpoint that verifies, or None. Damaged ones are named in a warning and skipped."""
    for step in reversed(committed_steps(folder)):
        path = _path(folder, step)
        try:
            note = storage.manifest(path)["note"]
            if note.get("key") != key:
                raise StorageError(f"{path}: belongs to another training run", "delete it, or use another folder")
            storage.verify(path)
            return note, _load(storage.fetch(path))
        except StorageError as error:
            log.warning("checkpoint skipped: %s", error.problem)
    return None


def _files(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _load(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("state-*.safetensors")):
        tensors |= load_file(str(file))
    return tensors


def committed_steps(folder: str) -> list[int]:
    """Steps with a committed checkpoint, ascending."""
    fs, inner = storage.filesystem(folder)
    if not fs.exists(inner):
        return []
    names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(inner, detail=True, refresh=True)]
    steps = sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))
    return [step for step in steps if storage.is_committed(_path(folder, step))]


def _path(folder: str, step: int) -> str:
    return storage.join(folder, f"step-{step:08d}")

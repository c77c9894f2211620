"""Locates the model and the importance scores for `minitron prune`, and downloads remote ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minitron import storage
from minitron.errors import InputError
from minitron_platform.cli.importance import scores_file
from minitron_platform.console import Console

if TYPE_CHECKING:
    from minitron.architecture import Architecture
    from minitron.importance import ImportanceScores

CONFIG = ("config.json",)
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
DUPLICATE_WEIGHTS = ("consolidated*", "original/*", "onnx/*")  # the same weights in other formats


def local_model(model: str, revision: str | None, files: Sequence[str]) -> str:
    """Path of `model` as a local folder or .gguf file.

    Downloads the files of a hub model that match the patterns `files` into the hub's cache. Raises InputError for a model that
    does not exist or cannot be downloaded.
    """
    from minitron.packages import PACKAGE, package_path

    path = Path(package_path(model)) if model.startswith(PACKAGE) else storage.local_path(model)
    if path.exists():
        if revision:
            raise InputError(f"--revision: {revision} has no effect, because {model} is local", "leave --revision out")
        return str(path)
    if model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise InputError(f"{model} does not exist", "give a checkpoint folder, a .gguf file or a hub name")
    return _download(model, revision, files)


def _download(name: str, revision: str | None, files: Sequence[str]) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    from minitron.models import quiet_transformers

    try:
        with quiet_transformers():
            return str(
                snapshot_download(
                    name, revision=revision, allow_patterns=list(files), ignore_patterns=list(DUPLICATE_WEIGHTS)
                )
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"{name!r}{at} is not a local folder or file, and cannot be downloaded from the hub ({_first_line(error)})",
            "check the path or the name, or connect to the network; for a gated model run `hf auth login`",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def local_scores(address: str, console: Console) -> Path:
    """Local path of the scores file: `address` itself, a local copy if it is remote, or the newest one of a local storage.

    Raises InputError for an address that does not exist, a remote folder, and a folder without scores.
    """
    if not storage.exists(address):
        raise InputError(
            f"--scores: {address} does not exist", "compute scores first: `minitron run RECIPE --until calibrate`"
        )
    if storage.is_local(address):
        return scores_file(console, storage.local_path(address))
    fs, inner = storage.filesystem(address)
    if fs.isdir(inner):
        raise InputError(
            f"--scores: {address} is a remote folder", f"give the file: {address}/stages/calibrate/…/scores.safetensors"
        )
    return storage.fetch_file(address)


def check_scores(scores: ImportanceScores, base: Architecture, file: Path) -> None:
    """Raise InputError unless the tensors of `scores`, read from `file`, have the shapes of the architecture `base`."""
    layers = base.num_layers
    experts = (base.num_experts,) if base.num_experts else ()
    expected = {
        "heads": (layers, base.num_heads),
        "neurons": (layers, *experts, base.intermediate_size),
        "channels": (base.hidden_size,),
        "similarity": (layers + 1, layers + 1),
        "experts": (layers, *experts) if experts else None,
    }
    for name, shape in expected.items():
        values = getattr(scores, name)
        actual = None if values is None else tuple(values.shape)
        if actual != shape:
            raise InputError(
                f"--scores: {file} has {_sized(name, actual)}, but this model has {_sized(name, shape)}",
                "give the scores that were computed for this model",
            )


def _sized(name: str, shape: tuple[int, ...] | None) -> str:
    return f"{name} {list(shape)}" if shape else f"no {name}"

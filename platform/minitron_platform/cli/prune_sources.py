"""Locates the model and the importance scores for `minitron prune`, and downloads remote ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minitron import storage
from minitron.errors import InputError
from minitron_platform.cli.importance import calibrations

if TYPE_CHECKING:
    from minitron.architecture import Architecture
    from minitron.importance import ImportanceScores

CONFIG = ("config.json",)
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
DUPLICATE_WEIGHTS = ("consolidated*", "original/*", "onnx/*")  # the same weights in other formats


def local_model(model: str, revision: str | None, files: Sequence[str]) -> str:
    """Path of `model` as a local folder or .gguf file.

    Downloads the files of a hub model that match the patterns `files` into the hub's cache, and copies one in remote storage
    into the user's, without weights for `CONFIG` alone. Raises InputError for a model that does not exist or cannot be
    downloaded.
    """
    from minitron.checkpoints.gguf_remote import header_copy
    from minitron.models import is_remote_source
    from minitron.packages import PACKAGE, package_path

    if is_remote_source(model):
        if not storage.is_uploaded(model):
            raise InputError(
                f"{model}: not a folder that minitron wrote, so nothing verifies it",
                "copy it to this machine, and give the copy",
            )
        _check_no_revision(revision, model, "is no hub model")
        header_only = model.endswith(".gguf") and files == CONFIG
        return str(header_copy(model) if header_only else storage.uploaded_copy(model, weights=files != CONFIG))
    path = Path(package_path(model)) if model.startswith(PACKAGE) else storage.local_path(model)
    if path.exists():
        _check_no_revision(revision, model, "is local")
        return str(path)
    if model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise InputError(f"{model} does not exist", "give a checkpoint folder, a .gguf file or a hub name")
    return _download(model, revision, files)


def _check_no_revision(revision: str | None, model: str, why: str) -> None:
    if revision:
        raise InputError(f"--revision: {revision} has no effect, because {model} {why}", "leave --revision out")


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


def check_outside(model: str, out: str) -> None:
    """Raise InputError for a target inside the folder of the model, which transformers would read as part of it."""
    inside = InputError(f"{out} is inside the model's folder {model}", "give a folder outside it")
    if not (storage.is_local(model) and storage.is_local(out)):
        if out.startswith(f"{model.rstrip('/')}/"):
            raise inside
        return
    source = storage.local_path(model).resolve()
    target = storage.local_path(out).resolve()
    if source.is_dir() and target.is_relative_to(source):
        raise inside


def sample_of(model: str) -> str | None:
    """The sample of the weights in a local folder; None for a .gguf file and for a folder without weights."""
    from minitron.checkpoints.headers import has_safetensors
    from minitron.checkpoints.sample import checkpoint_sample

    folder = Path(model)
    return checkpoint_sample(folder) if folder.is_dir() and has_safetensors(folder) else None


def local_scores(address: str) -> list[Path]:
    """Local paths of scores files: `address` itself, a local copy if it is remote, or those of a local storage, newest first.

    Raises InputError for an address that does not exist, a remote folder, and a folder without scores.
    """
    if not storage.exists(address):
        raise InputError(
            f"--scores: {address} does not exist", "compute scores first: `minitron run RECIPE --until calibrate`"
        )
    if storage.is_local(address):
        return calibrations(storage.local_path(address))
    fs, inner = storage.filesystem(address)
    if fs.isdir(inner):
        raise InputError(
            f"--scores: {address} is a remote folder", f"give the file: {address}/stages/calibrate/…/scores.safetensors"
        )
    return [Path(storage.fetch_file(address))]


def choose_scores(files: Sequence[Path], base: Architecture, sample: str | None) -> tuple[ImportanceScores, Path]:
    """The newest scores of the model with the architecture `base`, and their file.

    sample: of the model's weights; None if it is not known yet. Scores with this sample come before those that record none, and
    scores with another one are last. Raises InputError if no file's scores have the shapes of `base`.
    """
    from minitron.importance import ImportanceScores

    fitting: list[tuple[ImportanceScores, Path]] = []
    problem: InputError | None = None
    for file in files:
        scores = ImportanceScores.load(file)
        try:
            check_scores(scores, base, file)
        except InputError as error:
            problem = problem or error
        else:
            fitting.append((scores, file))
    if not fitting:
        assert problem is not None
        raise problem
    return min(fitting, key=lambda each: _distance(each[0], sample))


def _distance(scores: ImportanceScores, sample: str | None) -> int:
    """0 for scores of the model with this sample, 1 if that is not known, 2 for those of another model."""
    from minitron.importance.scores import WEIGHTS

    recorded = scores.provenance.get(WEIGHTS)
    if sample is None or recorded is None:
        return 1
    return 0 if recorded == sample else 2


def check_same_model(scores: ImportanceScores, sample: str, file: Path, *, allow_other: bool) -> str | None:
    """Raise InputError for scores that were computed on a model with other weights than those of `sample`.

    Returns a note if that is not known, or allowed by `allow_other`.
    """
    distance = _distance(scores, sample)
    if distance == 1:
        return f"{file} does not record the model that it was computed on; only its shapes were compared"
    if distance == 2 and not allow_other:
        raise InputError(
            f"--scores: {file} was computed on a model of this shape with other weights",
            "give the scores that were computed for this model, or add --allow-other-scores",
        )
    return f"{file} was computed on a model with other weights" if distance == 2 else None


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

"""Models that commands load: a folder, a .gguf file, package:NAME/PATH, a hub name, or MODEL@ALIAS of the registry."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minitron.errors import InputError
from minitron.packages import PACKAGE
from minitron.storage import is_local, local_path

if TYPE_CHECKING:
    import torch

    from minitron_platform.locations import Locations

REGISTERED = re.compile(r"^[^/\\@]+@[A-Za-z0-9_.-]+$")
ENGINES = ("transformers", "vllm")
DTYPE_HELP = "Dtype to compute in. [default: bfloat16 if the hardware multiplies it natively]"
MODEL_HELP = (
    "MODEL is a checkpoint folder, a .gguf file, package:NAME/PATH, a hub name, or NAME@ALIAS of the registry, such as "
    "smollm2-90m@champion."
)

SERVER_HELP = (
    "Or it is a model at an OpenAI-compatible server, http://HOST:8000/v1#NAME; #NAME may be left out if the server has one "
    "model, and OPENAI_API_KEY may have its key."
)


@dataclass(frozen=True)
class Loaded:
    """A model on the device, with its tokenizer."""

    model: Any
    tokenizer: Any
    dtype: str
    """By torch's name."""


def dtype_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --dtype."""
    choices = click.Choice(["auto", "bfloat16", "float32"])
    return click.option("--dtype", type=choices, default="auto", help=DTYPE_HELP)(command)


def engine_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --engine."""
    return click.option(
        "--engine",
        type=click.Choice(ENGINES),
        default=ENGINES[0],
        show_default=True,
        help="What loads the models; vllm: the command on the PATH.",
    )(command)


@contextmanager
def checkpoint(model: str, locations: Locations) -> Iterator[str]:
    """The source of a model, as `minitron.models.load_source` takes it; a registered one is copied for the time of the context.

    Its weights are compared with what was registered. Raises InputError and StorageError as `minitron models pull`.
    """
    if not is_registered(model):
        yield model
        return
    from minitron_platform.tracking.registry import pull

    name, alias = model.rsplit("@", 1)
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "model")
        pull(locations.tracking_uri, name, target, alias=alias, storage_root=locations.storage)
        yield target


def is_registered(model: str) -> bool:
    """Whether a model is named as one of the registry."""
    if model.startswith(PACKAGE) or not is_local(model) or local_path(model).exists():
        return False
    return REGISTERED.match(model) is not None


def check_models(models: Sequence[str], locations: Locations) -> int | None:
    """The fewest tokens that one of the models accepts, None if none says it: by what can be read before any is loaded.

    Raises InputError for a model that is given twice, does not exist or has other tensors than its config says, and
    MinitronError for a registry or server that does not answer.
    """
    from minitron.completions import Served, is_served, model_entry
    from minitron.models import check_contents, source_architecture

    if twice := next((model for number, model in enumerate(models) if model in models[:number]), None):
        raise InputError(f"MODEL: {twice} is given twice", "give each once")
    longest: list[int] = []
    for model in models:
        if is_served(model):
            model_entry(Served.parse(model))
        elif is_registered(model):
            _check_registered(model, locations)
        else:
            _, length = source_architecture(model)
            check_contents(model)
            longest += [length] if length else []
    return min(longest, default=None)


def _check_registered(model: str, locations: Locations) -> None:
    """Raise InputError if the registry has no such alias."""
    from minitron_platform.tracking.client import open_registry, version_named

    with open_registry(locations.tracking_uri) as client:
        version_named(client, model)


def load(source: str, dtype: str) -> Loaded:
    """Load a model to this machine's device. dtype: a name, or auto. Raises InputError as `minitron.models.load_source`."""
    from minitron.device import compute_dtype
    from minitron.distill.loading import load_source_together

    chosen: torch.dtype = compute_dtype(dtype)
    model, tokenizer = load_source_together(source, chosen, together=False)
    return Loaded(model, tokenizer, str(chosen).removeprefix("torch."))

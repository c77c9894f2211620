"""The command `minitron models push`: publishes a version on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import click

from minitron.errors import InputError, MinitronError, one_line
from minitron_platform.cli.options import UNVERIFIED_HELP, tracking_options
from minitron_platform.console import echo


@click.command()
@click.argument("model", metavar="MODEL[@ALIAS|/VERSION]")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Let everybody read a new repository. [default: private]")
@click.option("--unverified", is_flag=True, help=UNVERIFIED_HELP)
@tracking_options
def push(locations: Any, model: str, repository: str, public: bool, unverified: bool) -> None:
    """Upload the weights of a version to a repository of the Hugging Face hub, which is created if it does not exist.

    The content of every file is compared first with what was registered; nothing else in their folder is uploaded but the
    model card. The token is that of `hf auth login` or HF_TOKEN; HF_ENDPOINT names another hub. Called again after an
    interruption, it sends only what the hub does not have yet.
    """
    from minitron.storage import MANIFEST, manifest
    from minitron_platform.gates.card import licence_of
    from minitron_platform.tracking.client import open_registry, version_named
    from minitron_platform.tracking.lineage import title
    from minitron_platform.tracking.version_weights import CARD, verified_folder

    if "/" not in repository:
        raise InputError(f"{repository!r} does not say whose repository it is", f"give it as OWNER/{repository}")
    with open_registry(locations.tracking_uri) as client:
        version = version_named(client, model)
        with verified_folder(client, version, locations.storage, unverified=unverified) as folder:
            card = folder / CARD
            if not card.is_file():
                echo(f"{title(version)} has no model card, so {repository} will have none", err=True)
            elif licence_of(card.read_text(encoding="utf-8", errors="replace")) is None:
                echo(f"the model card of {title(version)} names no licence: add it in {repository}", err=True)
            names = [*manifest(str(folder))["files"], MANIFEST, *([CARD] if card.is_file() else [])]
            address = _upload(repository, folder, names, public=public, message=f"{title(version)}, by Minitron")
        client.set_model_version_tag(version.name, str(version.version), "minitron.pushed", address[:1000])
    echo(f"{title(version)}, verified, is at {address}")


def _upload(repository: str, folder: Path, names: Sequence[str], *, public: bool, message: str) -> str:
    """Commit files of a folder to a repository of the hub; returns the address of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        hub.create_repo(repository, private=not public, exist_ok=True)
        there = hub.model_info(repository)
        if not public and not there.private:
            raise InputError(
                f"{repository} is public: everybody could read the weights",
                "add --public if you want that, or choose another name",
            )
        if others := _read_too((file.rfilename for file in there.siblings or []), names):
            raise InputError(
                f"{repository} has {', '.join(others)}, which whoever loads this version from there would read, too",
                f"delete what is of another version (hf repos delete-files {repository} …), or choose another name",
            )
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in dict.fromkeys(names)]
        return str(hub.create_commit(repository, files, commit_message=message).commit_url)
    # RuntimeError: of a part of a large file
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise MinitronError(
            f"{repository}: cannot be uploaded to {hub.endpoint}: {one_line(error.__cause__ or error)}",
            "check the name, and the token with `hf auth whoami`; unset HF_HUB_OFFLINE; call it again to send what is missing",
        ) from error


def _read_too(there: Iterable[str], names: Sequence[str]) -> list[str]:
    """Files of a repository that are not among `names`, and that transformers or vLLM would read with or in place of them:
    weights, adapters, and what belongs to the tokenizer and to generation."""
    from minitron.checkpoints.companions import COMPANIONS, LICENCES
    from minitron.checkpoints.headers import ADAPTER, INDEX

    patterns = ("*.safetensors", INDEX, ADAPTER, *(pattern for pattern in COMPANIONS if pattern not in LICENCES))
    return [
        name for name in there if name not in names and any(PurePosixPath("/", name).match(f"/{p}") for p in patterns)
    ]

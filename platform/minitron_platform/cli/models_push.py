"""The command `minitron models push`: publishes a version on the Hugging Face hub."""

from __future__ import annotations

import os
from typing import Any

import click

from minitron.errors import MinitronError, one_line
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

    The content of every file is compared first with what was registered. The token is that of `hf auth login` or HF_TOKEN;
    HF_ENDPOINT names another hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    from minitron_platform.tracking.client import open_registry, version_named
    from minitron_platform.tracking.lineage import title
    from minitron_platform.tracking.version_weights import verified_folder

    with open_registry(locations.tracking_uri) as client:
        version = version_named(client, model)
        with verified_folder(client, version, locations.storage, unverified=unverified) as folder:
            hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
            try:
                hub.create_repo(repository, private=not public, exist_ok=True)
                done = hub.upload_folder(
                    repo_id=repository, folder_path=str(folder), commit_message=f"{title(version)}, by Minitron"
                )
            except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
                raise MinitronError(
                    f"{repository}: cannot be uploaded to {hub.endpoint}: {one_line(error)}",
                    "check the name, and the token with `hf auth whoami`; unset HF_HUB_OFFLINE",
                ) from error
        client.set_model_version_tag(version.name, str(version.version), "minitron.pushed", str(done.commit_url)[:1000])
    echo(f"{title(version)}, verified, is at {done.commit_url}")

"""Checks of what runs use besides the nodes: MLflow, and the tokens of the Ray cluster and the model hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from minitron.errors import InputError, MinitronError
from minitron.storage import redact
from minitron_platform.cluster.tokens import auth_token
from minitron_platform.doctor.finding import Finding
from minitron_platform.tracking.check import check_tracking

EXPERIMENT = "Default"  # every MLflow has it
HUB_SECONDS = 10.0


def service_findings(tracking_uri: str) -> Iterator[Finding]:
    """The findings about MLflow at `tracking_uri`, and about tokens."""
    yield mlflow(tracking_uri)
    yield ray_token()
    yield hub_token()


def mlflow(tracking_uri: str) -> Finding:
    """Whether MLflow answers, and accepts this user."""
    where = redact(tracking_uri)
    try:
        problem = check_tracking(tracking_uri, EXPERIMENT)
    except MinitronError as error:
        return Finding("MLflow", where, "failed", error.problem, error.remedy)
    if problem:
        return Finding("MLflow", where, "warning", problem, "start it, or correct --tracking-uri")
    return Finding("MLflow", where, "ok", "answers")


def ray_token() -> Finding:
    """Whether the token that this user sends to clusters can be read, and only by the user."""
    try:
        token = auth_token()
    except InputError as error:
        return Finding("Ray token", "this machine", "failed", error.problem, error.remedy)
    if token is None:
        return Finding("Ray token", "this machine", "skipped", "none; a cluster that asks for one refuses this user")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    if not os.environ.get("RAY_AUTH_TOKEN") and Path(path).expanduser().stat().st_mode & 0o077:
        return Finding("Ray token", "this machine", "warning", f"other users can read {path}", f"chmod 600 {path}")
    return Finding("Ray token", "this machine", "ok", "set")


def hub_token() -> Finding:
    """Whether the model hub accepts the token, without which gated models cannot be read."""
    from huggingface_hub import constants, get_token, whoami
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    token = get_token()
    if token is None:
        return Finding("hub token", "this machine", "skipped", "none; gated models cannot be read")
    if constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE:
        return Finding("hub token", "this machine", "skipped", "set; not tried, because HF_HUB_OFFLINE is set")
    try:
        user = whoami(token)["name"]
    except (HfHubHTTPError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        return Finding("hub token", "this machine", "failed", reason, "set HF_TOKEN to a valid token, or unset it")
    except (OSError, HTTPError) as error:
        reason = f"the hub does not answer ({type(error).__name__})"
        return Finding("hub token", "this machine", "warning", reason, "set HF_HUB_OFFLINE=1 to use local models alone")
    return Finding("hub token", "this machine", "ok", f"user {user}")

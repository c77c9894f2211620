"""The token of a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path

from minitron.errors import InputError, MinitronError


def auth_token() -> str | None:
    """The cluster's token from where Ray reads it (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token); None if not set.

    Raises InputError if RAY_AUTH_TOKEN_PATH names a file that cannot be read or is empty.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            token = Path(path).expanduser().read_text().strip()
        except OSError as error:
            raise InputError(
                f"RAY_AUTH_TOKEN_PATH={path}: {error.strerror}",
                "set it to the path of the file with the cluster's token",
            ) from error
        if not token:
            raise InputError(f"RAY_AUTH_TOKEN_PATH={path}: the file is empty", "write the cluster's token to it")
        return token
    default = Path.home() / ".ray" / "auth_token"
    return (default.read_text().strip() or None) if default.is_file() else None


def refused_token(where: str) -> MinitronError:
    """The error for a head that does not let this process in. where: its address, as the message begins."""
    reason = "the head refused the token" if auth_token() else "the head requires a token"
    return MinitronError(
        f"{where}: {reason}",
        "set RAY_AUTH_TOKEN_PATH to the file with the cluster's token (on the head: `ray get-auth-token`)",
    )

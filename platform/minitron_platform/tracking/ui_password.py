"""The password of `minitron ui`, which keeps the other users of a machine out: MLflow's server serves the files of whoever
started it to everybody who reaches its port."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from minitron.cache import cache_folder
from minitron.errors import StorageError
from minitron.storage import PRIVATE
from minitron.storage.private import write_new

USER = "minitron"
# Comparing a password takes MLflow a tenth of a second, and a page makes dozens of requests.
_CONFIG = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{folder}/users.db
admin_username = {user}
admin_password = {password}
auth_cache_ttl_seconds = 3600
"""


def password_file() -> Path:
    """The file with the user's password, which only its owner may read: made by the first call."""
    path = cache_folder() / "ui-password"
    with suppress(FileExistsError):
        write_new(path, secrets.token_urlsafe(24).encode(), PRIVATE)
    return path


def read_password() -> str:
    """The user's password. Raises StorageError for a file that is a link, or that other users may read or write."""
    path = password_file()
    status = path.lstat()
    text = path.read_text().strip() if status.st_uid == os.getuid() and status.st_mode & 0o170077 == 0o100000 else ""
    if len(text) < 12 or not all(character.isalnum() or character in "-_" for character in text):
        raise StorageError(f"{path}: not a password that only you know", "delete it, and run again")
    return text


def auth_settings(folder: Path, password: str) -> dict[str, str]:
    """The environment of an MLflow server that asks for the password. folder: of the server's own files, which only this user
    may read."""
    config = folder / "auth.ini"
    write_new(config, _CONFIG.format(folder=folder, user=USER, password=password).encode(), PRIVATE)
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",  # also routes that MLflow has no rule for
    }

"""Whether a place can be written, found before the work whose results go there. Nothing is left of the try."""

from __future__ import annotations

import tempfile
from pathlib import Path
from uuid import uuid4

from minitron.errors import NotWritableError, StorageError
from minitron.storage.addresses import is_local, join, local_path
from minitron.storage.files import remove, write_bytes
from minitron.storage.problems import disk_errors, nearest_parent


def check_folder_writable(path: str) -> None:
    """Raise StorageError if no file can be written into a folder, which need not exist yet. In remote storage an empty file is
    written there and deleted."""
    if is_local(path):
        with disk_errors(path):
            check_local_folder(local_path(path))
        return
    probe = join(path, f".writable-{uuid4().hex}")  # its own name: others may check the same folder at this moment
    try:
        write_bytes(probe, b"")
        remove(probe)
    except StorageError as error:
        raise type(error)(error.problem.replace(probe, path), error.remedy) from error


def check_local_folder(folder: Path) -> None:
    """Raise OSError if no file can be written into a folder of this machine, or the folder cannot be created."""
    with tempfile.TemporaryFile(dir=nearest_parent(folder)):
        pass


def check_file_writable(path: str) -> None:
    """Raise StorageError if a file cannot be written at `path`, whose folder need not exist yet."""
    if not is_local(path):
        check_folder_writable(path.rpartition("/")[0])
        return
    if local_path(path).is_dir():
        raise NotWritableError(f"{path}: is a folder", "give the name of a file")
    try:
        check_folder_writable(str(local_path(path).parent))
    except NotWritableError as error:
        raise NotWritableError(f"{path}: {error.problem}", error.remedy) from error

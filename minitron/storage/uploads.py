"""Files of a user's machine in storage that other machines read: committed folders named by their content."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.errors import InputError
from minitron.storage.addresses import check_address, join
from minitron.storage.copies import fetch
from minitron.storage.folders import committed_folder, is_committed, manifest
from minitron.storage.hashing import fingerprint, sha256


def upload_files(files: Mapping[str, Path], root: str) -> str:
    """Copy files to the folder below `root` that is named by their content, unless they are there; returns its address.

    files: local path by path inside the folder. Raises InputError for a file that changes meanwhile.
    """
    hashes = hashes_of(files)
    target = join(root, fingerprint(hashes))
    commit_files(files, target, hashes)
    return target


def hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of local files, by the names that they are given."""
    return {name: sha256(path) for name, path in files.items()}


def commit_files(files: Mapping[str, Path], target: str, hashes: Mapping[str, str]) -> None:
    """Copy files to the committed folder `target`, unless it is there. files: local path by path inside the folder. hashes:
    what `hashes_of` gave, by which `target` was named. Raises InputError for a file that has changed since."""
    if is_committed(target):
        return
    copied: dict[str, dict[str, Any]] = {}
    with committed_folder(target, known=copied) as folder:
        for name, path in files.items():
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            if sha256(copy) != hashes[name]:
                raise InputError(f"{path}: changed while it was uploaded", "run again when nothing writes to it")
            copied[name] = {"bytes": copy.stat().st_size, "sha256": hashes[name]}


def is_uploaded(address: str) -> bool:
    """Whether an address is a committed folder, or directly in one."""
    return _committed_parts(address) is not None


def uploaded_copy(address: str, *, weights: bool = True) -> Path:
    """The local path of an uploaded file or folder, copied to this machine and verified. weights: whether safetensors files are
    copied too. Raises InputError if it was not uploaded."""
    folder, inner = _parts(address)
    return fetch(folder, weights=weights) / inner


def uploaded_hashes(address: str) -> dict[str, str]:
    """SHA-256 of every file of the committed folder that an uploaded file or folder is in, by path. Raises InputError if it
    was not uploaded."""
    return {name: entry["sha256"] for name, entry in manifest(_parts(address)[0])["files"].items()}


def uploaded_size(address: str) -> int:
    """Bytes of an uploaded file. Raises InputError if it was not uploaded."""
    folder, inner = _parts(address)
    entry = manifest(folder)["files"].get(inner)
    if entry is None:
        raise InputError(f"{address} is not a file", "give the address of a file that was uploaded")
    return int(entry["bytes"])


def _parts(address: str) -> tuple[str, str]:
    """(committed folder, path inside it): the address is the folder itself or directly inside it."""
    if (parts := _committed_parts(address)) is not None:
        return parts
    raise InputError(
        f"{address.rstrip('/')}: not uploaded by minitron, and not a folder that it wrote",
        "give the path on your machine together with --upload, which copies it there",
    )


def _committed_parts(address: str) -> tuple[str, str] | None:
    check_address(address)
    address = address.rstrip("/")
    if is_committed(address):
        return address, ""
    folder, name = address.rsplit("/", 1)
    return (folder, name) if not folder.endswith(":/") and is_committed(folder) else None

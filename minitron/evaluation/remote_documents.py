"""Benchmark documents in remote storage: what `--upload` has put there, or any folder in the layout of local ones.

A folder that was uploaded is verified by its manifest. Of another one the documents are copied to the user's cache, and copied
again when the storage lists another size or version of a file.
"""

from __future__ import annotations

from pathlib import Path

from minitron import storage
from minitron.errors import InputError
from minitron.evaluation.suites import folder_in

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".json")


def documents_copy(address: str) -> Path:
    """The local copy of a file or folder of documents. A task's folder is found as in a local folder with one folder per task.

    Raises InputError if there are no documents, and StorageError for a file whose name leads out of the folder.
    """
    if storage.is_uploaded(address):
        return storage.uploaded_copy(address)
    found, files = _listed(address)
    if "" in files:  # the address of a file
        folder, name = found.rsplit("/", 1)
        return storage.fetch_listed(folder, {name: files[""]}) / name
    return storage.fetch_listed(found, files)


def versions(address: str) -> list[list[str | int]]:
    """[name, size in bytes, version] of every file of documents at an address that was not uploaded. Raises InputError if there
    are none."""
    return [[name, file.size, file.version] for name, file in sorted(_listed(address)[1].items())]


def _listed(address: str) -> tuple[str, dict[str, storage.ListedFile]]:
    """The address of the documents, and their files by name; a file at the address itself has an empty name."""
    address = address.rstrip("/")
    files = _documents(address)
    data, _, task = address.rpartition("/")
    if not files and not data.endswith(":/"):
        address = (
            f"{data}/{folder_in(task, lambda inner: storage.entries(storage.join(data, inner) if inner else data))}"
        )
        files = _documents(address)
    if not files:
        raise InputError(
            f"{data}/{task}: there are no benchmark documents",
            "check the address: its files are named by split, such as test.jsonl or test.parquet; or give a folder of your "
            "machine together with --upload, which copies it there",
        )
    return address, files


def _documents(address: str) -> dict[str, storage.ListedFile]:
    return {
        name: file
        for name, file in storage.listed_files(address).items()
        if (name or address).endswith(SUFFIXES) and name.rsplit("/", 1)[-1] != storage.MANIFEST
    }

"""The weights of a registered version: where they are, whether they are those that were registered, and copies of them.

A version's weights are a committed folder (`minitron.storage`) or a logged model that was uploaded from one. The registry has
the SHA-256 of its manifest, and the manifest that of every file, so that the content of all files is compared.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import InputError, StorageError
from minitron.names import check_name, inside
from minitron.storage import (
    MANIFEST,
    committed_folder,
    disk_errors,
    exists,
    fingerprint,
    is_committed,
    is_local,
    join,
    local_path,
    manifest,
    read_bytes,
    read_bytes_if_exists,
    sha256,
    verify,
    write_bytes,
)
from minitron.storage.private import lock_file
from minitron.storage.ranges import read_ranges

if TYPE_CHECKING:
    from mlflow import MlflowClient

MANIFEST_TAG = "minitron.manifest_sha256"
PATH_TAG = "minitron.storage_path"  # path of the weights relative to the storage
CARD = "README.md"  # the model card beside the weights, which is not part of their identity
LOCK = ".lock"  # in the folder of an unfinished copy
PIECE = 8 * 2**20  # bytes of a request
AT_ONCE = 8  # requests for pieces of a file at the same time
UPLOADED = "models:/"  # how the address of a logged model starts


class AlteredError(StorageError):
    """A file of a version's weights with another content than was registered."""


def location(version: Any, storage_root: str | None) -> str:
    """Location of a version's weights: in the storage at `storage_root` if they are there, else where they were registered."""
    path = version.tags.get(PATH_TAG)
    if storage_root is None or path is None:
        return str(version.source)
    folder = join(storage_root, check_name(path, f"model version {version.name} {version.version}"))
    return folder if folder != version.source and is_committed(folder) else str(version.source)


def read_card(client: MlflowClient, version: Any, storage_root: str | None) -> str | None:
    """The model card beside a version's weights, in the storage or in MLflow; None if there is none. Raises StorageError for
    uploaded weights that were replaced."""
    folder = location(version, storage_root)
    if folder.startswith(UPLOADED):
        with _source(client, version, storage_root, unverified=True) as uploaded:
            assert isinstance(uploaded, UploadedWeights)
            card = uploaded.card()
    else:
        card = read_bytes_if_exists(join(folder, CARD))
    return None if card is None else card.decode(errors="replace")


def check_weights(client: MlflowClient, version: Any, storage_root: str | None, *, unverified: bool = False) -> None:
    """Raise StorageError, with its name, for a file of a version's weights that is missing or altered, and for a version that
    does not say what was registered, unless `unverified`."""
    with _source(client, version, storage_root, unverified) as source:
        if isinstance(source, str):
            verify(source)
            return
        for name in source.files:
            with tempfile.TemporaryDirectory() as folder:
                source.copy(name, Path(folder) / "file")


def copy_weights(
    client: MlflowClient, version: Any, storage_root: str | None, target: str, *, unverified: bool = False
) -> None:
    """Copy a version's weights to the folder `target`. Raises StorageError as `check_weights`; nothing is written then.

    What an interrupted call has copied to a local folder is not copied again (of uploaded weights, whole files only), and a
    whole copy is compared alone. Raises InputError for a folder with other weights.
    """
    with _source(client, version, storage_root, unverified) as source:
        files = manifest(source)["files"] if isinstance(source, str) else source.files
        if is_committed(target):
            if manifest(target)["files"] != files:
                raise InputError(
                    f"{target}: other weights than those of {title(version)} are in it", "give a new folder"
                )
            verify(target)
            return
        with _resumed_folder(target, files) as folder:
            for name, expected in files.items():
                path = inside(folder, name, f"{title(version)}: {MANIFEST}")
                if path.is_file() and path.stat().st_size == expected["bytes"] and sha256(path) == expected["sha256"]:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(source, str):
                    _copy_file(join(source, name), path, expected)
                else:
                    source.copy(name, path)
        # beside the committed files, because it says what was measured of them
        card = read_bytes_if_exists(join(source, CARD)) if isinstance(source, str) else source.card()
        if card is not None and CARD not in files:
            write_bytes(join(target, CARD), card)


def _copy_file(source: str, path: Path, expected: dict[str, Any]) -> None:
    """Copy a file, after the bytes of it that an interrupted call has copied. Raises StorageError for another content."""
    if not exists(source):
        raise StorageError(f"{source}: missing", "choose another version")
    resumed = _append_rest(source, path, expected["bytes"])
    if resumed and sha256(path) != expected["sha256"]:  # the bytes that were there were not those of the file
        path.unlink()
        _append_rest(source, path, expected["bytes"])
    _compare(source, path, expected)


def _append_rest(source: str, path: Path, size: int) -> bool:
    """Copy what a file of `size` bytes lacks, in pieces; returns whether a part of it was there."""
    done = path.stat().st_size if path.is_file() else 0
    if done >= size:  # another content: it was compared
        done = 0
    with open(path, "ab") as file:
        file.truncate(done)
        for start in range(done, size, PIECE * AT_ONCE):
            ends = range(start, min(start + PIECE * AT_ONCE, size), PIECE)
            for data in read_ranges(source, [(begin, min(begin + PIECE, size)) for begin in ends]):
                file.write(data)
    return done > 0


@contextmanager
def _resumed_folder(target: str, files: dict[str, Any]) -> Iterator[Path]:
    """As `committed_folder`, but what an interrupted call for the same files has left is used: beside a local target, in a
    hidden folder that is named after their hashes."""
    if not is_local(target):
        with committed_folder(target, new=True) as folder:
            yield folder
        return
    final = local_path(target)
    part = final.with_name(f".{final.name}.{fingerprint(files)[:16]}.part")
    with disk_errors(target):
        part.mkdir(parents=True, exist_ok=True)
        if part.is_symlink():
            raise StorageError(f"{part}: is a link", "delete it")
        with _alone(part, target):
            yield from _filled(part, target, files)


def _filled(part: Path, target: str, files: dict[str, Any]) -> Iterator[Path]:
    """Yield `part`, and publish at `target` what is in it then."""
    try:
        yield part
        for file in [path for path in part.rglob("*") if path.is_file()]:
            if str(file.relative_to(part)) not in {LOCK, *files}:  # half a file, under a temporary name
                file.unlink()
        with committed_folder(target, new=True) as folder:
            for path in part.iterdir():
                if path.name != LOCK:
                    os.rename(path, folder / path.name)
            (part / LOCK).unlink()
            part.rmdir()
    except AlteredError:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def _alone(part: Path, target: str) -> Iterator[None]:
    """Raise StorageError if another process fills the folder `part`: two would append to the same files."""
    with lock_file(part / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = os.path.samestat((part / LOCK).stat(), os.fstat(lock))
        except (BlockingIOError, FileNotFoundError):  # the other one has just published it
            is_free = False
        if not is_free:
            raise StorageError(
                f"{target}: another process is copying the same weights to it",
                "wait until it has ended, or give another folder",
            )
        yield


@contextmanager
def verified_folder(
    client: MlflowClient, version: Any, storage_root: str | None, *, unverified: bool = False
) -> Iterator[Path]:
    """A folder of this machine with a version's weights, whose content was compared: where they are, or a copy for as long as
    the context. Raises StorageError as `check_weights`."""
    with _source(client, version, storage_root, unverified) as source:
        if isinstance(source, str) and is_local(source):
            verify(source)
            yield local_path(source)
            return
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        copy_weights(client, version, storage_root, f"{folder}/weights", unverified=unverified)
        yield Path(folder) / "weights"


def title(version: Any) -> str:
    return f"version {version.version} of model {version.name!r}"


@contextmanager
def _source(
    client: MlflowClient, version: Any, storage_root: str | None, unverified: bool
) -> Iterator[str | UploadedWeights]:
    """The committed folder, or the uploaded model, whose manifest is the registered one."""
    expected = version.tags.get(MANIFEST_TAG)
    if not version.source:
        raise StorageError(f"{title(version)}: the registry has no location of its weights", "choose another version")
    if expected is None and not unverified:
        raise StorageError(
            f"{title(version)}: the registry does not say which weights were registered, the tag {MANIFEST_TAG} is missing",
            "register them again, or add --unverified if you know that nobody has replaced them",
        )
    if version.source.startswith(UPLOADED):
        with tempfile.TemporaryDirectory() as folder:
            yield UploadedWeights(client, version, Path(folder), expected)
        return
    weights = location(version, storage_root)
    if not is_committed(weights):
        raise StorageError(
            f"{title(version)}: {weights} has no {MANIFEST}",
            "choose a version whose weights exist, or name the storage that they are in",
        )
    _check_manifest(version, read_bytes(join(weights, MANIFEST)), expected)
    yield weights


def _check_manifest(version: Any, text: bytes, expected: str | None) -> None:
    if expected is not None and hashlib.sha256(text).hexdigest() != expected:
        raise StorageError(
            f"{title(version)}: its weights were replaced after they were registered",
            "register the new weights, which creates another version, and choose that",
        )


def _compare(name: str, path: Path, expected: dict[str, Any]) -> None:
    """Raise StorageError for a copied file with another content than the manifest says."""
    actual = sha256(path)
    if actual != expected["sha256"]:
        raise AlteredError(f"{name}: SHA-256 is {actual}, expected {expected['sha256']}", "register the weights again")


class UploadedWeights:
    """A logged model. Its manifest, of the SHA-256 `expected` if that is known, is downloaded to `folder`."""

    def __init__(self, client: MlflowClient, version: Any, folder: Path, expected: str | None) -> None:
        self._client = client
        self._title = title(version)
        model_id = version.source.removeprefix(UPLOADED)
        self._address = client.get_logged_model(model_id).artifact_location
        self._sizes = uploaded_sizes(client, model_id)
        path = self._download(MANIFEST, folder)
        _check_manifest(version, path.read_bytes(), expected)
        self.files: dict[str, dict[str, Any]] = manifest(str(path.parent))["files"]

    def copy(self, name: str, target: Path) -> None:
        """Download a file. Raises StorageError if its content is not what the manifest says."""
        expected = self.files[name]
        if self._sizes.get(name) != expected["bytes"]:
            raise AlteredError(
                f"{self._title}: {name} has {self._sizes.get(name, 'no')} bytes in MLflow, {expected['bytes']} were uploaded",
                "delete the version and its logged model in MLflow, and register the weights again",
            )
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            os.replace(self._download(name, Path(folder)), target)
        _compare(f"{self._title}: {name}", target, expected)

    def card(self) -> bytes | None:
        """The model card; None if none was uploaded."""
        if CARD not in self._sizes:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return self._download(CARD, Path(folder)).read_bytes()

    def _download(self, name: str, folder: Path) -> Path:
        from mlflow.artifacts import download_artifacts

        tracking_uri = self._client.tracking_uri
        return Path(download_artifacts(f"{self._address}/{name}", dst_path=str(folder), tracking_uri=tracking_uri))


def uploaded_sizes(client: MlflowClient, model_id: str, folder: str | None = None) -> dict[str, int]:
    """Size in bytes of each file of a logged model, by its path."""
    sizes: dict[str, int] = {}
    for entry in client.list_logged_model_artifacts(model_id, folder):
        if entry.is_dir:
            sizes.update(uploaded_sizes(client, model_id, entry.path))
        else:
            sizes[entry.path] = entry.file_size
    return sizes

"""Rows of a dataset on the Hugging Face hub, streamed; `path` may also be a local folder in the layout of a hub dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron.data.dataset_files import own_files
from minitron.errors import InputError, StorageError
from minitron.files import file_stat, files_below
from minitron.storage import fingerprint


def commit(path: str, revision: str | None) -> str:
    """The commit that `revision` (default: the newest) of a dataset resolves to; one request, nothing is downloaded.

    For a local folder: a hash of its files' names, sizes and modification times, symbolic links followed.

    Raises InputError if there is no such dataset or revision, StorageError if the hub cannot be reached or a link is dangling.
    """
    if is_local_folder(path):
        files = sorted(Path(file) for file in files_below(path))
        stats = {str(file.relative_to(path)): stat for file in files if (stat := file_stat(file))}
        return fingerprint([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()])

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().dataset_info(path, revision=revision, timeout=30).sha)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"path: no dataset {path!r} on the hub, or you have no access to it",
            "check the name; for a private or gated dataset run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"revision: {path} has no revision {revision!r}", "use a branch, tag or commit") from error
    except (HTTPError, OSError) as error:
        raise _unreachable(path, error) from error


def is_local_folder(path: str) -> bool:
    """Whether a dataset is a folder on this machine in the layout of the hub."""
    return Path(path).is_dir()


def num_shards(path: str, name: str | None, split: str, revision: str | None) -> int:
    """Number of shards, mostly files, that a split consists of; nothing is downloaded but their names. Raises as `rows`."""
    with _named_errors(path, name, split, revision):
        return int(_stream(path, name, split, revision).num_shards)


def rows(
    path: str, name: str | None, split: str, revision: str | None, shard: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, Any]]:
    """Stream the rows of one split in the dataset's order, without downloading it first.

    shard: (number, number of all): a contiguous share of the rows; the number of all is 1, or that of `num_shards`.
    Raises InputError for an unknown dataset, configuration or split, for a dataset that names files outside itself, and for
    rows that do not have the types of the first ones; StorageError when the hub cannot be reached.
    """
    with _named_errors(path, name, split, revision):
        stream = _stream(path, name, split, revision)
        if shard[1] > 1:
            stream = stream.shard(num_shards=shard[1], index=shard[0], contiguous=True)
        yield from stream


def _stream(path: str, name: str | None, split: str, revision: str | None) -> Any:
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no telemetry
    folder = Path(path).resolve() if is_local_folder(path) else None
    # the whole path of a folder, because `datasets` has formats of its own under names such as csv and pandas
    with own_files(folder):
        stream = datasets.load_dataset(str(folder or path), name, split=split, revision=revision, streaming=True)
    # a row's images and sounds may be addresses, which would be opened; only declared columns can have them
    return stream.decode(False) if stream.features else stream


@contextmanager
def _named_errors(path: str, name: str | None, split: str, revision: str | None) -> Iterator[None]:
    import datasets

    try:
        yield
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise InputError(
            f"hub dataset {path!r}, name {name!r}, split {split!r}, revision {revision!r}: {error}",
            "check path, name, split and revision",
        ) from error
    except OSError as error:
        raise _unreachable(path, error) from error


def _unreachable(path: str, error: Exception) -> StorageError:
    return StorageError(
        f"hub dataset {path!r}: cannot be reached ({type(error).__name__}: {error})",
        "check the network and HF_ENDPOINT, or copy the dataset to this machine and use kind: parquet or jsonl",
    )

"""Where benchmark documents are: the folder that is named, and the files of its splits. The documents are not read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from minitron.errors import InputError
from minitron.evaluation.document_files import readable
from minitron.files import file_stat, files_below
from minitron.packages import PACKAGE, package_path
from minitron.storage import is_local, is_uploaded, local_path, uploaded_copy, uploaded_hashes

FORMATS = (
    "an Arrow folder (Dataset.save_to_disk), or files named by split, such as test.jsonl, test.jsonl.gz, test.jsonl.zst or "
    "test.parquet"
)
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")


def locate(data: str) -> Path:
    """The file or folder that `data` names: a local path, `package:NAME/inner/folder` inside an installed package, or one in
    remote storage that was uploaded, which is copied to this machine.

    The package is not imported. Raises InputError if the package or the path does not exist, or if a remote one was not
    uploaded.
    """
    if data.startswith(PACKAGE):
        return package_path(data)
    path = local_path(data) if is_local(data) else uploaded_copy(data)
    remedy = f"check the path, or give {FORMATS}"
    if not path.exists():
        raise InputError(f"{data}: no such file or folder", remedy)
    return path


def locate_documents(data: str) -> Path:
    """As `locate`, of benchmark documents, which need not have been uploaded to remote storage."""
    if data.startswith(PACKAGE) or is_local(data):
        return locate(data)
    from minitron.evaluation.remote_documents import documents_copy

    path = documents_copy(data)
    if not path.exists():
        raise InputError(f"{data}: no such file or folder", f"check the path, or give {FORMATS}")
    return path


def documents_identity(data: str) -> list[list[str | int]]:
    """[relative path, size in bytes, modification time in ns] of every file at `data`: changes when the documents, splits or
    subjects change. Symbolic links are followed. In remote storage [path, SHA-256] of what was uploaded, otherwise [path, size,
    version] as the storage lists them.

    Raises InputError as `locate`, and StorageError for a dangling link."""
    if not data.startswith(PACKAGE) and not is_local(data):
        if is_uploaded(data):
            return [[name, sha256] for name, sha256 in sorted(uploaded_hashes(data).items())]
        from minitron.evaluation.remote_documents import versions

        return versions(data)
    root = locate(data)
    if root.is_file():
        files = {root.name: root}
    else:
        files = {str(path.relative_to(root)): path for path in map(Path, files_below(str(root)))}
    return [[name, stat.st_size, stat.st_mtime_ns] for name in sorted(files) if (stat := file_stat(files[name]))]


def find_splits(path: Path) -> dict[str, list[Path]]:
    """{split name: its Arrow folder or its files} at `path`, without reading the documents.

    Raises InputError if there are no files in a supported format.
    """
    if path.is_file():
        splits = {_split_name(path): [path]} if _is_data(path) else {}
    elif (path / "state.json").is_file():
        splits = {_arrow_split(path): [path]}
    else:
        splits = {}
        for inner in sorted(path.iterdir()):
            if (inner / "state.json").is_file():
                splits.setdefault(inner.name, []).append(inner)
            elif _is_data(inner):
                splits.setdefault(_split_name(inner), []).append(inner)
    if not splits:
        raise InputError(f"{path}: contains no benchmark documents", f"give {FORMATS}")
    return splits


def check_whole(paths: list[Path]) -> None:
    """Raise InputError unless the files of one split are a single one, or all shards NAME-00000-of-0000N of the same kind."""
    names = [path.name for path in paths]
    shards = [_SHARD.search(_stem(path)) for path in paths]
    found = [(int(shard[1]), int(shard[2])) for shard in shards if shard]
    if not found and len(paths) == 1:
        return
    count = found[0][1] if found else 0
    if len(found) < len(paths) or len({_suffix(path) for path in paths}) > 1 or {of for _, of in found} != {count}:
        raise InputError(
            f"{paths[0].parent}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''} are of one split, whose documents "
            "would count several times",
            "leave one of them there: a file, or shards NAME-00000-of-0000N of one number N and one format",
        )
    numbers = {number for number, _ in found}
    missing = next((number for number in range(count) if number not in numbers), None)
    if missing is not None or len(found) != count:
        raise InputError(
            f"{paths[0].parent}: of {count} shards as {names[0]} there are {len(found)}"
            + (f", without number {missing}" if missing is not None else ""),
            "copy the missing ones; to score a part of the documents, give a limit",
        )


def _is_data(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIXES)


def _split_name(path: Path) -> str:
    """The split that a file belongs to: "test" for test.jsonl.gz and for test-00000-of-00002.parquet."""
    return _SHARD.sub("", _stem(path))


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _stem(path: Path) -> str:
    return path.name.removesuffix(_suffix(path))


def _arrow_split(folder: Path) -> str:
    with readable(folder):
        return str(dict(json.loads((folder / "state.json").read_text())).get("_split") or folder.name)

"""Reading benchmark documents from local files: their location, splits and content.

Files are read directly; nothing is downloaded, cached or written.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import InputError
from minitron.files import file_stat, files_below
from minitron.packages import PACKAGE, package_path
from minitron.storage import is_local, is_uploaded, local_path, uploaded_copy, uploaded_hashes

if TYPE_CHECKING:
    import datasets

FORMATS = (
    "an Arrow folder (Dataset.save_to_disk), or files named by split, such as test.jsonl, test.jsonl.gz, test.jsonl.zst or "
    "test.parquet"
)
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LONGEST_REASON = 250
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


def read_split(paths: list[Path]) -> datasets.Dataset:
    """All documents of one split, in memory; `paths` as `find_splits` returns them.

    Raises InputError naming the file and line that cannot be read, for a split without documents, and as `check_whole`.
    """
    check_whole(paths)
    import datasets
    import pyarrow

    parts = [_read(path) for path in paths]
    try:
        documents = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{paths[0].parent}: its {len(paths)} files of one split have different fields ({error})",
            "give files with the same fields",
        ) from error
    if len(documents) == 0:
        raise InputError(f"{paths[0]}: contains no documents", "give a file with at least one document")
    return documents


def count_documents(paths: list[Path]) -> int:
    """Number of documents of a split; for parquet and jsonl they are not parsed. Raises InputError as `check_whole`."""
    check_whole(paths)
    total = 0
    for path in paths:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            with _readable(path):
                total += pyarrow.parquet.read_metadata(path).num_rows
        elif path.is_dir():
            total += len(read_split([path]))
        else:
            total += sum(bool(line.strip()) for line in _lines(path))
    return total


def places(paths: list[Path], numbers: Collection[int]) -> dict[int, tuple[str, dict[str, Any] | None]]:
    """Where documents of a split are, by their numbers in it, which begin with 0: "FILE, line 3" or "FILE, document 3"; and
    what that line of a .jsonl file says (None for other files)."""
    found: dict[int, tuple[str, dict[str, Any] | None]] = {}
    first = 0
    for path in paths:
        of_file: Iterable[tuple[str, dict[str, Any] | None]]
        if path.is_dir() or path.suffix == ".parquet":
            of_file = [(f"{path}, document {number + 1}", None) for number in range(count_documents([path]))]
        else:
            of_file = ((f"{path}, line {line}", document) for line, document in _numbered_json(path))
        for number, place in enumerate(of_file, first):
            if number in numbers:
                found[number] = place
            first = number + 1
    return found


def with_nulls(documents: datasets.Dataset) -> list[int]:
    """Numbers of the documents in which a field, or one inside a field, is null or missing."""
    import pyarrow.compute

    columns = list(documents.data.columns)
    missing = None
    while columns:
        column = columns.pop()
        if column.null_count:
            mask = pyarrow.compute.is_null(column)
            missing = mask if missing is None else pyarrow.compute.or_(missing, mask)
        if pyarrow.types.is_struct(column.type):
            columns += column.flatten()
    if missing is None:
        return []
    return [number for number, each in enumerate(missing.to_pylist()) if each]


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
    with _readable(folder):
        return str(dict(json.loads((folder / "state.json").read_text())).get("_split") or folder.name)


def _read(path: Path) -> datasets.Dataset:
    import datasets
    import pyarrow.parquet

    if path.is_dir() or path.suffix == ".parquet":
        with _readable(path):
            if path.is_dir():
                return datasets.Dataset.load_from_disk(str(path), keep_in_memory=True)
            return datasets.Dataset(pyarrow.parquet.read_table(path))
    numbered = list(_numbered_json(path))
    try:
        return datasets.Dataset.from_list([document for _, document in numbered])
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path}{_other_type(numbered)}: its documents cannot be read as one table "
            f"({' '.join(str(error).split())[:LONGEST_REASON]})",
            "give every document the same fields, each with values of one type",
        ) from error


def _other_type(numbered: list[tuple[int, dict[str, Any]]]) -> str:
    """Where a field first has a value of another type than in the documents before: ", line 3, field 'label': text after a
    number"; empty if nowhere."""
    first: dict[str, tuple[str, int]] = {}
    for line, document in numbered:
        for name, value in document.items():
            if value is None:
                continue
            kind = next((words for types, words in _KINDS if isinstance(value, types)), "a value")
            before, there = first.setdefault(name, (kind, line))
            if kind != before:
                return f", line {line}, field {name!r}: {kind}, and {before} on line {there}"
    return ""


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "text"),
    (list, "a list"),
    (dict, "an object"),
)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise InputError for a file that cannot be read, or is not what its name says."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError, OSError) as error:
        kind = "an Arrow folder (Dataset.save_to_disk)" if path.is_dir() else "a whole parquet file"
        raise InputError(
            f"{path}: its documents cannot be read: is not {kind} ({' '.join(str(error).split())[:LONGEST_REASON]})",
            "copy or download it again",
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which may be compressed by gzip or Zstandard. Raises InputError if that is damaged."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as unpacked:
                yield from unpacked
        elif path.suffix == ".zst":
            import pyarrow

            with open(path, "rb") as packed, pyarrow.CompressedInputStream(packed, "zstd") as stream:
                yield from io.BufferedReader(stream)
        else:
            with open(path, "rb") as lines:
                yield from lines
    except (OSError, EOFError, zlib.error) as error:
        what = "unpacked" if path.suffix in (".gz", ".zst") else "read"
        raise InputError(f"{path}: cannot be {what} ({error})", "copy or download it again") from error


def _numbered_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The documents of a file with the numbers of their lines, from 1; empty lines are none."""
    for number, line in enumerate(_lines(path), start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not text.strip():
            continue
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8, and a number of 5,000 digits
            raise InputError(
                f"{path}, line {number}: not JSON ({error})", "write one JSON object on each line"
            ) from error
        if not isinstance(document, dict):
            raise InputError(f"{path}, line {number}: not a JSON object", "write one JSON object on each line")
        yield number, document

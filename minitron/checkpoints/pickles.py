"""Names, shapes and dtypes of the tensors in files that torch.save wrote, unpickled as tensors and nothing else."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minitron.checkpoints.headers import PICKLES, Header, by_name, indexed_files
from minitron.checkpoints.reading import readable
from minitron.errors import InputError
from minitron.storage.tensors import NAMES

OLD_FORMAT = b"\x80\x02"  # a pickle of protocol 2, which torch wrote before its zip archives


def pickled_headers(folder: Path) -> dict[str, Header]:
    """As `minitron.checkpoints.headers.read_headers`, for weights in .bin files. No values are read, unless a file is of the
    format before torch 1.6, which is read whole.

    Raises InputError for a file that is missing, or cut off, or contains something else than torch.save writes of weights.
    """
    single, index = (folder / name for name in PICKLES)
    files = [single.name] if single.exists() else indexed_files(index)
    return by_name(str(folder), (header for file in files for header in _stored(folder / file)))


def _stored(path: Path) -> Iterator[Header]:
    is_archive = zipfile.is_zipfile(path)
    with open(path, "rb") as opened:
        start = opened.read(len(OLD_FORMAT))
    if not is_archive and start != OLD_FORMAT:
        raise InputError(
            f"{path}: is not a file of torch.save, or a part of it is missing ({path.stat().st_size:,} bytes)",
            "download or copy it again",
        )
    with readable(str(path), "download or copy it again"):
        state = torch.load(path, map_location="meta" if is_archive else "cpu", weights_only=True, mmap=is_archive)
    for name, tensor in state.items() if isinstance(state, Mapping) else ():
        if isinstance(tensor, Tensor):
            dtype = NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            yield Header(str(name), path.name, tuple(tensor.shape), dtype)

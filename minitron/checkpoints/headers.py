"""Names, shapes and dtypes of a checkpoint's tensors, read from the files' headers without reading a weight."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minitron.checkpoints.hub_errors import given_by_hub
from minitron.errors import InputError, one_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # read by transformers if there are no safetensors
ADAPTER = "adapter_config.json"  # peft's; transformers adds the adapters in the same folder to the model
LONGEST_REASON = 250
INDEX_BYTES = 2**28  # twice the size of an index of a million tensors


@dataclass(frozen=True)
class Header:
    """One stored tensor: its name, file and shape, and its dtype in safetensors' spelling ("BF16")."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str


def has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def has_pickles(folder: Path) -> bool:
    return any((folder / name).exists() for name in PICKLES)


def check_no_adapter(folder: Path) -> None:
    """Raise InputError for a folder with peft adapters, which change the model without being part of its weights."""
    if (folder / ADAPTER).exists():
        raise has_adapters(str(folder))


def has_adapters(where: str) -> InputError:
    return InputError(
        f"{where}: {ADAPTER} adds adapters to the model",
        "merge them: load it with peft, model.merge_and_unload(), then save_pretrained; or remove the adapter's files",
    )


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor in the safetensors files of a folder that transformers reads, by name.

    Raises InputError if there are none, if a file is missing or damaged, or if two files have a tensor of the same name.
    """
    return by_name(str(folder), _stored(folder))


def _stored(folder: Path) -> Iterator[Header]:
    for file in _files(folder):
        try:
            with safe_open(str(folder / file), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    yield Header(name, file, tuple(tensor.get_shape()), str(tensor.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise damaged(folder / file, error) from error


def by_name(where: str, stored: Iterable[Header]) -> dict[str, Header]:
    """Tensors by name. Raises InputError if two files have one of the same name. where: the checkpoint's name in errors."""
    # of two tensors transformers uses the one in the last file, whatever the index says
    headers: dict[str, Header] = {}
    for header in stored:
        if header.name in headers:
            raise InputError(
                f"{where}: {header.name} is both in {headers[header.name].file} and in {header.file}",
                "download or copy the checkpoint again, into an empty folder",
            )
        headers[header.name] = header
    return headers


def _files(folder: Path) -> list[str]:
    index = folder / INDEX
    if (folder / SINGLE).exists():  # transformers' order
        return [SINGLE]
    if not index.exists():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        note = f"; it has {pickled[0]}, which is not read because a pickle can run code" if pickled else ""
        raise InputError(
            f"{folder}: no {SINGLE} and no {INDEX}{note}",
            "convert it: load it with transformers and save_pretrained, which writes safetensors",
        )
    return indexed_files(index)


def indexed_files(index: Path) -> list[str]:
    """The files that a checkpoint's index names, sorted. Raises InputError for an index that is damaged and for a file that is
    not beside it."""
    if index.stat().st_size > INDEX_BYTES:
        raise InputError(f"{index}: too large for an index ({index.stat().st_size:,} bytes)", "download it again")
    try:
        contents = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(index, error) from error
    shards = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index}: has no weight_map of tensors and their files", "download or copy it again")
    files = sorted({str(file) for file in shards.values()})
    missing = [file for file in files if Path(file).name != file or not (index.parent / file).is_file()]
    if missing:
        raise InputError(
            f"{index}: of the {len(files)} files that it names, {len(missing)} are missing, such as {missing[0]!r}",
            "download or copy them again",
        )
    return files


def damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file}: cannot be read ({one_line(error, LONGEST_REASON)})", "download or copy it again")


def hub_headers(name: str, revision: str | None) -> dict[str, Header]:
    """As `read_headers`, for a model on the hub: from the local cache if it has the weights, otherwise from the headers of the
    files on the hub.

    Raises InputError for a model without safetensors, and if the weights are not in the cache and the hub does not give them.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    for file in (SINGLE, INDEX):
        cached = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str):
            try:
                return read_headers(Path(cached).parent)
            except InputError:
                if file == SINGLE:
                    raise
                break  # the index is in the cache, but not all of its files
    try:
        with given_by_hub(name):
            metadata = HfApi().get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError as error:
        raise InputError(
            f"{name}: has no safetensors on the hub; files of other formats are pickles, which can run code",
            "use another revision (for many models refs/pr/1 or another pull request has safetensors), or convert it: load it "
            "with transformers and save_pretrained",
        ) from error
    except SafetensorsParsingError as error:
        raise InputError(f"{name}: the safetensors files cannot be read ({error})", "use another revision") from error
    return by_name(
        name,
        (
            Header(tensor_name, file, tuple(tensor.shape), str(tensor.dtype))
            for file, stored in metadata.files_metadata.items()
            for tensor_name, tensor in stored.tensors.items()
        ),
    )

"""The files beside a checkpoint's weights and config, which a pruned checkpoint gets a copy of: tokenizer, licence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minitron.errors import InputError
from minitron.files import is_part_of

LICENCES = ("LICENSE*", "NOTICE*")
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    *LICENCES,
)


def companions(folder: Path) -> Iterator[Path]:
    """The companion files of the checkpoint in `folder`. Raises InputError as `check_links` does."""
    for pattern in COMPANIONS:
        for file in folder.glob(pattern):
            if file.is_file():
                check_link(folder, file)
                yield file


def check_links(folder: Path) -> None:
    """Raise InputError for a config or companion file that is a link to a file outside the model: what a stranger's link leads
    to, such as a private key, would become part of what is made from the model.

    Links into the blobs of the same model in the hub's cache are accepted, and those of weights, which are read as tensors
    alone.
    """
    if (folder / "config.json").exists():
        check_link(folder, folder / "config.json")
    for _ in companions(folder):
        pass


def check_link(folder: Path, file: Path) -> None:
    """Raise InputError for a file that is a link to one outside the model in `folder`."""
    if not is_part_of(folder, file):
        raise InputError(
            f"{file}: a link to {file.resolve()}, which is not part of the model",
            "if the model needs this file, replace the link by a copy; otherwise delete the link",
        )

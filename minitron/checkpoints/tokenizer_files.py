"""The tokenizer of a checkpoint, and whether it belongs to the model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minitron.checkpoints.gguf_header import check_gguf
from minitron.checkpoints.reading import quiet_transformers, readable
from minitron.errors import InputError

FAST = "tokenizer.json"  # needs no other package
# files of other formats that transformers converts, and the package that it needs for that
CONVERTED = (("*.tiktoken", "tiktoken"), ("tekken.json", "mistral-common"), ("*.model", "sentencepiece"))
OTHERS = ("vocab.json", "vocab.txt", "*.gguf")  # read without another package
SHOWN = 3  # names of tokens in an error


def read_tokenizer(folder: str, where: str, **arguments: Any) -> Any:
    """The tokenizer of a checkpoint folder, a hub model or, with the argument `gguf_file`, a GGUF file.

    where: its name in errors. Raises InputError for a folder without a tokenizer, one that cannot be read, and one that needs a
    package which is not installed.
    """
    from transformers import AutoTokenizer

    if "gguf_file" in arguments:
        check_gguf(Path(folder, arguments["gguf_file"]))
    elif Path(folder).is_dir():
        _check_files(Path(folder), where)
    with readable(f"{where}: the tokenizer", "copy or download the tokenizer's files again"), quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, **arguments)


def _check_files(folder: Path, where: str) -> None:
    if (folder / FAST).exists():
        return
    for pattern, package in CONVERTED:
        file = next(folder.glob(pattern), None)
        if file is None:
            continue
        if find_spec(package.replace("-", "_")) is None:
            raise InputError(
                f"{where}: of its tokenizer there is only {file.name}, which cannot be read without the package {package}",
                f"pip install {package}, or save the tokenizer with transformers where it is installed: that writes {FAST}",
            )
        return
    if not any(next(folder.glob(pattern), None) for pattern in OTHERS):
        raise InputError(
            f"{where}: the folder has no tokenizer",
            f"add the model's {FAST}, which save_pretrained of its tokenizer writes",
        )


def check_tokenizer_fits(tokenizer: Any, vocab_size: int, where: str) -> None:
    """Raise InputError if a tokenizer has tokens that a model with a vocabulary of `vocab_size` does not have."""
    excess = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= vocab_size)
    if excess:
        names = ", ".join(f"{token!r} = {number}" for number, token in excess[:SHOWN])
        more = ", …" if len(excess) > SHOWN else ""
        raise InputError(
            f"{where}: the tokenizer has {len(excess):,} tokens beyond the model's vocabulary of {vocab_size:,} "
            f"({names}{more})",
            "give the tokenizer that the model was trained with, or give the model the tokens with resize_token_embeddings",
        )

"""Packing: tokenise a corpus once, split it by document, concatenate, cut into fixed-length rows, write shards and an index."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minitron.arguments import check_tokenizer, check_type
from minitron.data.documents import TextSource, documents, source_identity
from minitron.data.rows import FORMAT, INDEX, Rows, Split, shard_name
from minitron.data.special_tokens import DocumentTokens, document_tokens
from minitron.errors import InputError, StorageError
from minitron.storage import committed_folder, fingerprint, is_committed, join, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 2**18  # per tokenizer call: well under a second, so that progress is reported regularly
LONGEST_PIECE = 2**20  # longest part of a document that is tokenised in one call, characters
SHARD_ROWS = 8192


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how text becomes ids: normaliser, vocabulary, merges, added tokens.

    For a tokenizer without the `tokenizers` library behind it: class, vocabulary and special tokens. Raises InputError for an
    object that is not a tokenizer.
    """
    check_tokenizer("tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = tokenizer.get_vocab()
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        return fingerprint([type(tokenizer).__name__, vocabulary, special])
    state = json.loads(backend.to_str())
    # Calls to the tokenizer change these two, and packing uses neither.
    return fingerprint({key: value for key, value in state.items() if key not in ("truncation", "padding")})


def pack(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    target: str,
    *,
    seq_length: int,
    train_rows: int,
    heldout_rows: int,
    heldout_fraction: float | None = 0.05,
    add_bos: bool | None = None,
    shard_rows: int = SHARD_ROWS,
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """Tokenise a source once into `target` (any fsspec path) and return its training rows.

    seq_length: tokens per row. train_rows, heldout_rows: number of rows in each split; reading stops when both are
    complete. The end-of-text token follows every document, and a row may contain several documents. Special tokens that
    are spelled out in the text become those tokens.

    add_bos: whether every document starts with a beginning-of-sequence token (BOS); None: if the tokenizer adds it by
    itself (`minitron.data.special_tokens`). With BOS, a row that starts inside a document also begins with BOS and the
    document continues after it, because the model has never seen a context that starts otherwise. BOS inside a row is
    predicted like any token; after the end-of-text token it is certain and adds almost nothing to the loss. BOS at the
    start of a row is never a target.

    heldout_fraction: a document is held out if the hash of its text falls in this fraction, so that the same text is never
    in both splits, whatever its name and order. None: heldout_rows / (train_rows + heldout_rows), with which both splits
    fill at about the same time. A larger fraction leaves training text unread, a smaller one held-out text. The index
    records it.

    progress: called about once a second with (tokens written, tokens in total).

    A target that already contains the rows of the same request is opened as it is. Raises InputError if the source ends too
    early (with the number of rows it gave), and StorageError if `target` contains other rows.
    """
    check_type("source", source, TextSource)
    check_type("target", target, str, "the path of a folder")
    around = document_tokens(tokenizer, add_bos)
    request = _request(source, tokenizer, around, seq_length, train_rows, heldout_rows, heldout_fraction, shard_rows)
    if not is_committed(target):
        with committed_folder(target, note={"kind": "rows"}) as folder:
            index = _write(folder, documents(source), tokenizer, around, request, progress)
            write_json(str(folder / INDEX), index)
    # Also after writing: another process may have published its rows first.
    if read_json(join(target, INDEX)).get("request") != request:
        raise StorageError(
            f"{target}: contains rows packed from another source or with other settings",
            "delete it or choose another folder",
        )
    return Rows.open(target, "train")


def _request(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    around: DocumentTokens,
    seq_length: int,
    train_rows: int,
    heldout_rows: int,
    heldout_fraction: float | None,
    shard_rows: int,
) -> dict[str, Any]:
    """Everything that determines the rows, checked, as JSON values."""
    for name, value, least in (
        ("seq_length", seq_length, 2 + len(around.begin)),
        ("train_rows", train_rows, 1),
        ("heldout_rows", heldout_rows, 0),
        ("shard_rows", shard_rows, 1),
    ):
        if value < least:
            raise InputError(f"{name} is {value}", f"use at least {least}")
    fraction = heldout_rows / (train_rows + heldout_rows) if heldout_fraction is None else heldout_fraction
    if not (0 <= fraction < 1) or (heldout_rows and fraction == 0):
        raise InputError(f"heldout_fraction is {fraction}", "use a number above 0 and below 1, such as 0.05")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token", "set its eos_token")
    # Defaults of formats without these two keys are left out, so that rows packed then match the same request.
    begin = {"begin": list(around.begin)} if around.begin else {}
    end = {"end": list(around.end)} if len(around.end) > 1 else {}
    return {
        **begin,
        **end,
        "source": source_identity(source),
        "tokenizer": tokenizer_identity(tokenizer),
        "eos": tokenizer.eos_token_id,
        "seq_length": seq_length,
        "rows": {"train": train_rows, "heldout": heldout_rows},
        "heldout_fraction": fraction,
        "shard_rows": shard_rows,
    }


def _write(
    folder: Path,
    texts: Iterator[Any],
    tokenizer: PreTrainedTokenizerBase,
    around: DocumentTokens,
    request: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    length, shard_rows = request["seq_length"], request["shard_rows"]
    writers = {
        split: _Writer(folder, split, rows, around, length, shard_rows, dtype)
        for split, rows in request["rows"].items()
    }
    total = sum(writer.capacity for writer in writers.values())
    batch: list[_Piece] = []
    characters = 0
    reported = 0.0
    for document in texts:
        writer = writers[_split_of(document.text, request["heldout_fraction"])]
        if not writer.full:
            for piece, first, last in _pieces(document.text):
                batch.append(_Piece(writer, piece, first, last))
                characters += len(piece)
                if characters >= BATCH_CHARACTERS:
                    _tokenise(batch, tokenizer)
                    batch = []
                    characters = 0
        if progress and time.monotonic() - reported > 1:
            progress(sum(writer.done for writer in writers.values()), total)
            reported = time.monotonic()
        if all(writer.full for writer in writers.values()):
            break
    _tokenise(batch, tokenizer)
    for writer in writers.values():
        writer.close()
    _check_full(writers)
    if progress:
        progress(total, total)
    return {
        "format": FORMAT,
        "seq_length": length,
        "dtype": dtype.str,
        "shard_rows": shard_rows,
        "vocab_size": vocab_size,
        "splits": {split: writer.summary() for split, writer in writers.items()},
        "request": request,
    }


def _split_of(text: str, heldout_fraction: float) -> Split:
    # Hash the text, not its name: the same text under two names must not be in both splits.
    number = int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")
    return "heldout" if number < heldout_fraction * 2**64 else "train"


def _pieces(text: str) -> Iterator[tuple[str, bool, bool]]:
    """(piece, whether it is the first, whether it is the last). A text of more than a million characters is cut at line
    ends, so that memory stays bounded and reading can stop inside it."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        end = text.rfind("\n", start, start + LONGEST_PIECE) + 1 or start + LONGEST_PIECE
        yield text[start:end], start == 0, False
        start = end
    yield text[start:], start == 0, True


def _check_full(writers: dict[Split, _Writer]) -> None:
    if all(writer.full for writer in writers.values()):
        return
    rows = " and ".join(f"{writer.rows_done} of {writer.rows} {split} rows" for split, writer in writers.items())
    documents = " and ".join(f"{writer.documents} {split} documents" for split, writer in writers.items())
    incomplete = [split for split, writer in writers.items() if not writer.full]
    if any(writer.documents == 0 for writer in writers.values() if writer.rows):
        remedy = (
            "a document belongs to one split as a whole: give more and shorter documents (one per line in a jsonl file)"
        )
    elif incomplete == ["heldout"]:
        remedy = "raise heldout_fraction, lower heldout_rows, or give more text"
    elif incomplete == ["train"]:
        remedy = "lower train_rows, seq_length or heldout_fraction, or give more text"
    else:
        remedy = "lower train_rows, heldout_rows or seq_length, or give more text"
    raise InputError(f"the source ends after {rows} (from {documents})", remedy)


@dataclass
class _Piece:
    writer: _Writer
    text: str
    first: bool
    last: bool


def _tokenise(batch: list[_Piece], tokenizer: PreTrainedTokenizerBase) -> None:
    batch = [piece for piece in batch if not piece.writer.full]
    if not batch:
        return
    texts = [piece.text for piece in batch]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # do not warn of documents longer than the model's context
    )
    for piece, ids in zip(batch, encoded["input_ids"], strict=True):
        piece.writer.add(ids, len(piece.text), first=piece.first, last=piece.last)


class _Writer:
    """Writes one split to shards: full rows are written, an incomplete row is buffered."""

    def __init__(
        self,
        folder: Path,
        split: str,
        rows: int,
        around: DocumentTokens,
        seq_length: int,
        shard_rows: int,
        dtype: np.dtype,
    ) -> None:
        self.folder = folder
        self.split = split
        self.rows = rows
        self.capacity = rows * seq_length  # tokens
        self.done = 0  # tokens written
        self.documents = 0
        self.characters = 0
        self._seq_length = seq_length
        self._shard_tokens = shard_rows * seq_length
        self._dtype = dtype
        self._around = around
        self._begin = np.asarray(around.begin, dtype)
        self._incomplete = np.empty(0, dtype)  # the row that is being filled
        self._sha = hashlib.sha256()
        self._file: Any = None

    @property
    def full(self) -> bool:
        return self.done == self.capacity

    @property
    def rows_done(self) -> int:
        return self.done // self._seq_length

    def add(self, ids: list[int], characters: int, *, first: bool, last: bool) -> None:
        """Add the next tokens of a document. first, last: whether they are the document's first or last ones."""
        if self.full:
            return
        self.characters += characters
        self.documents += last
        if first or not len(self._incomplete):
            ids = self._around.opened(ids) if first else [*self._begin, *ids]
        if last:
            ids = [*ids, *self._around.end]
        tokens = np.concatenate([self._incomplete, np.asarray(ids, dtype=self._dtype)])
        row = tokens[: self._seq_length]
        rest = tokens[self._seq_length :]
        if len(row) < self._seq_length:
            self._incomplete = row
            return
        # the rows after the first start inside the document
        text_tokens = self._seq_length - len(self._begin)
        full = len(rest) // text_tokens
        more = np.hstack([np.tile(self._begin, (full, 1)), rest[: full * text_tokens].reshape(full, text_tokens)])
        self._write(np.concatenate([row, more.ravel()])[: self.capacity - self.done])
        remainder = rest[full * text_tokens :]
        self._incomplete = np.concatenate([self._begin, remainder]) if len(remainder) else remainder

    def _write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            number, used = divmod(self.done, self._shard_tokens)
            if used == 0:
                self.close()
                self._file = open(self.folder / shard_name(self.split, number), "wb")  # noqa: SIM115
            part = tokens[: self._shard_tokens - used]
            self._file.write(part.tobytes())
            self._sha.update(part.tobytes())
            self.done += len(part)
            tokens = tokens[len(part) :]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self.rows_done,
            "documents": self.documents,
            "characters": self.characters,
            "sha256": self._sha.hexdigest(),
        }

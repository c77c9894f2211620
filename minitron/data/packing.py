"""Text to rows, once: tokenise, split by document, join, cut into fixed-length rows, write shards and an index."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minitron.data.documents import TextSource, documents, source_identity
from minitron.data.rows import FORMAT, INDEX, Rows, Split, shard_name
from minitron.data.special_tokens import DocumentTokens, document_tokens
from minitron.errors import InputError, StorageError
from minitron.storage import committed_folder, fingerprint, is_committed, join, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 2**18  # per tokenizer call: well under a second, so that progress is never silent
LONGEST_PIECE = 2**20  # characters of one document tokenised at a time
SHARD_ROWS = 8192


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that turns text into ids: normaliser, vocabulary, merges, added tokens.

    A tokenizer that is not backed by the `tokenizers` library is known by its class, vocabulary and special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        name, vocabulary = type(tokenizer).__name__, tokenizer.get_vocab()
        return fingerprint([name, vocabulary, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}])
    state = json.loads(backend.to_str())
    # Calls change these two, and packing uses neither.
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

    seq_length: tokens per row. train_rows, heldout_rows: how many rows each split gets; reading stops when both have
    theirs. The end-of-text token follows every document, and rows run on over documents. Special tokens written out in
    the text become those tokens.

    add_bos: whether a beginning-of-sequence token (BOS) stands before every document; None: as the tokenizer does it by
    itself (`minitron.data.special_tokens`). Where it does, a row that starts inside a document begins with BOS too, and the
    document goes on after it: the model has never seen a context that starts otherwise. BOS inside a row is predicted like
    any token; after the end-of-text token it is certain, and adds next to nothing to the loss. That at a row's start is
    never a target.

    A document is held out when the hash of its text falls in heldout_fraction, so a text is never on both sides,
    whatever its name and order. None stands for heldout_rows / (train_rows + heldout_rows): both splits fill at about
    the same time. A larger fraction than that leaves training text unread, a smaller one held-out text; the index
    records it.

    progress: called with (tokens in rows, tokens wanted), at least every second or so.

    A target that already holds the same request's rows is opened as it is. Raises InputError when the source ends first
    (with how many rows there were), and StorageError when `target` holds other rows.
    """
    around = document_tokens(tokenizer, add_bos)
    request = _request(source, tokenizer, around, seq_length, train_rows, heldout_rows, heldout_fraction, shard_rows)
    if not is_committed(target):
        with committed_folder(target, note={"kind": "rows"}) as folder:
            index = _write(folder, documents(source), tokenizer, around, request, progress)
            write_json(str(folder / INDEX), index)
    # Also after writing: another process may have published its rows first.
    if read_json(join(target, INDEX)).get("request") != request:
        raise StorageError(f"{target}: holds rows of another request", "delete it or choose another folder")
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
    """What decides the rows, checked; as JSON gives it back."""
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
    # What is as it was before there was a choice is not named: rows packed then are the same request's.
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
    total = sum(writer.wanted for writer in writers.values())
    batch: list[_Piece] = []
    characters, reported = 0, 0.0
    for document in texts:
        writer = writers[_side(document.text, request["heldout_fraction"])]
        if not writer.full:
            for piece, first, last in _pieces(document.text):
                batch.append(_Piece(writer, piece, first, last))
                characters += len(piece)
                if characters >= BATCH_CHARACTERS:
                    _tokenise(batch, tokenizer)
                    batch, characters = [], 0
        if progress and time.monotonic() - reported > 1:
            progress(sum(writer.done for writer in writers.values()), total)
            reported = time.monotonic()
        if all(writer.full for writer in writers.values()):
            break
    _tokenise(batch, tokenizer)
    for writer in writers.values():
        writer.close()
    _enough(writers)
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


def _side(text: str, heldout_fraction: float) -> Split:
    # The text and not its name: the same text under two names must not be on both sides.
    number = int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")
    return "heldout" if number < heldout_fraction * 2**64 else "train"


def _pieces(text: str) -> Iterator[tuple[str, bool, bool]]:
    """(piece, whether it is the first, whether it is the last): a text of more than a million characters is cut after the ends
    of lines, so that memory stays bounded and reading can stop inside it."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        end = text.rfind("\n", start, start + LONGEST_PIECE) + 1 or start + LONGEST_PIECE
        yield text[start:end], start == 0, False
        start = end
    yield text[start:], start == 0, True


def _enough(writers: dict[Split, _Writer]) -> None:
    if all(writer.full for writer in writers.values()):
        return
    had = " and ".join(f"{writer.rows_done} of {writer.rows} {split} rows" for split, writer in writers.items())
    used = " and ".join(f"{writer.documents} {split} documents" for split, writer in writers.items())
    short = [split for split, writer in writers.items() if not writer.full]
    if any(writer.documents == 0 for writer in writers.values() if writer.rows):
        remedy = (
            "a document is never split between the two: give more and shorter documents (one per line in a jsonl file)"
        )
    elif short == ["heldout"]:
        remedy = "raise heldout_fraction, ask for fewer held-out rows, or give more text"
    elif short == ["train"]:
        remedy = "ask for fewer rows, shorten seq_length, lower heldout_fraction, or give more text"
    else:
        remedy = "ask for fewer rows, shorten seq_length, or give more text"
    raise InputError(f"the source ends after {had} (from {used})", remedy)


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
        verbose=False,  # a document longer than the model's context is no mistake here
    )
    for piece, ids in zip(batch, encoded["input_ids"], strict=True):
        piece.writer.add(ids, len(piece.text), first=piece.first, last=piece.last)


class _Writer:
    """One split on its way to disk: whole rows go out as they fill, what is left waits."""

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
        self.folder, self.split, self.rows = folder, split, rows
        self.wanted = rows * seq_length  # tokens
        self.done = 0  # tokens written
        self.documents = 0
        self.characters = 0
        self._seq_length, self._shard_tokens, self._dtype = seq_length, shard_rows * seq_length, dtype
        self._around, self._begin = around, np.asarray(around.begin, dtype)
        self._left = np.empty(0, dtype)  # the row that is being filled
        self._sha = hashlib.sha256()
        self._file: Any = None

    @property
    def full(self) -> bool:
        return self.done == self.wanted

    @property
    def rows_done(self) -> int:
        return self.done // self._seq_length

    def add(self, ids: list[int], characters: int, *, first: bool, last: bool) -> None:
        """The next tokens of a document's text: its first, its last, or both."""
        if self.full:
            return
        self.characters += characters
        self.documents += last
        if first or not len(self._left):
            ids = self._around.opened(ids) if first else [*self._begin, *ids]
        if last:
            ids = [*ids, *self._around.end]
        tokens = np.concatenate([self._left, np.asarray(ids, dtype=self._dtype)])
        row, rest = tokens[: self._seq_length], tokens[self._seq_length :]
        if len(row) < self._seq_length:
            self._left = row
            return
        # the rows after the first start inside the document
        own = self._seq_length - len(self._begin)
        whole = len(rest) // own
        more = np.hstack([np.tile(self._begin, (whole, 1)), rest[: whole * own].reshape(whole, own)])
        self._put(np.concatenate([row, more.ravel()])[: self.wanted - self.done])
        left = rest[whole * own :]
        self._left = np.concatenate([self._begin, left]) if len(left) else left

    def _put(self, tokens: np.ndarray) -> None:
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

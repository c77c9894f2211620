"""From documents to chunks: token ids with a table of the pieces of text that they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from minitron.data.documents import LeftOut, part_documents
from minitron.data.parts import Part
from minitron.data.rows import Split
from minitron.data.sources import TextSource
from minitron.data.special_tokens import DocumentTokens
from minitron.errors import MinitronError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 2**18  # per tokenizer call: well under a second, so that progress is reported regularly
LONGEST_PIECE = 2**20  # longest part of a document that is tokenised in one call, characters
SPLITS: tuple[Split, ...] = ("train", "heldout")
HASH_BYTES = 16
PIECE = np.dtype(
    [
        ("split", "u1"),  # index into SPLITS
        ("first", "?"),  # whether it begins a document
        ("last", "?"),  # whether it ends one
        ("tokens", "<i8"),  # special tokens included
        ("characters", "<i8"),
        ("missing", "<i8"),  # documents left out since the piece before it, see `LeftOut`
        ("length", "<i8"),
        ("hash", f"S{HASH_BYTES}"),  # of the document's text without the white space around it
    ]
)


@dataclass(frozen=True)
class Tokenising:
    """How the documents of one source become tokens; it can be pickled.

    heldout_fraction: share of the documents that is held out: 0 none, 1 all. dtype: of the token ids.
    """

    source: TextSource
    tokenizer: PreTrainedTokenizerBase
    around: DocumentTokens
    heldout_fraction: float
    dtype: np.dtype


@dataclass(frozen=True)
class Chunk:
    """Consecutive pieces of documents and their tokens.

    pieces: table of dtype PIECE, in the order of the text. tokens: those of the pieces of the first split one after the other,
    then those of the next. A document begins and ends with its special tokens; one of more than a million characters consists
    of several pieces, each of which may be in another chunk.
    """

    pieces: np.ndarray
    tokens: np.ndarray


def token_starts(pieces: np.ndarray) -> np.ndarray:
    """The position of each piece's first token among the tokens of their chunk."""
    order = np.argsort(pieces["split"], kind="stable")
    tokens = pieces["tokens"][order]
    starts = np.empty(len(pieces), np.int64)
    starts[order] = np.cumsum(tokens) - tokens
    return starts


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Consecutive chunks, at least one, as one."""
    train = [int(one.pieces["tokens"][one.pieces["split"] == 0].sum()) for one in chunks]
    parts = [one.tokens[:count] for one, count in zip(chunks, train, strict=True)]
    parts += [one.tokens[count:] for one, count in zip(chunks, train, strict=True)]
    return Chunk(np.concatenate([one.pieces for one in chunks]), np.concatenate(parts))


def nothing_full(split: Split) -> bool:
    """For tokenising without knowing which splits are complete."""
    return False


def tokenise(how: Tokenising, part: Part, full: Callable[[Split], bool] = nothing_full) -> Iterator[Chunk]:
    """The chunks of a part of a source.

    full: whether a split needs no more text; its documents are not tokenised then. An error in the text is raised after the
    chunks of the text before it.
    """
    left_out = LeftOut()
    batch = _Batch(how)
    failure: MinitronError | None = None
    texts = part_documents(how.source, part, how.tokenizer, left_out)
    while True:
        try:
            document = next(texts, None)
        except MinitronError as error:
            failure = error
            break
        if document is None:
            break
        digest = hashlib.sha256(document.text.strip().encode()).digest()
        number = int(_is_heldout(digest, how.heldout_fraction))
        is_full = full(SPLITS[number])
        for text, first, last in [("", True, True)] if is_full else _pieces(document.text):
            batch.add(text, (number, first and not is_full, last and not is_full), left_out, digest)
            if batch.characters >= BATCH_CHARACTERS or len(batch.texts) >= BATCH_CHARACTERS // 16:
                yield batch.chunk()
                batch = _Batch(how)
    if left_out.missing or left_out.length:
        batch.add("", (0, False, False), left_out, b"")
    if batch.texts:
        yield batch.chunk()
    if failure is not None:
        raise failure


def _is_heldout(digest: bytes, heldout_fraction: float) -> bool:
    # By the text, not by its name: the same text under two names must not be in both splits.
    return int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64


def _pieces(text: str) -> Iterator[tuple[str, bool, bool]]:
    """(piece, whether it is the first, whether it is the last). A text of more than a million characters is cut at line
    ends, so that memory stays bounded and reading can stop inside it."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        end = text.rfind("\n", start, start + LONGEST_PIECE) + 1 or start + LONGEST_PIECE
        yield text[start:end], start == 0, False
        start = end
    yield text[start:], start == 0, True


class _Batch:
    """Pieces of text that are tokenised together."""

    def __init__(self, how: Tokenising) -> None:
        self.how = how
        self.texts: list[str] = []
        self.characters = 0
        self._rows: list[tuple[Any, ...]] = []

    def add(self, text: str, position: tuple[int, bool, bool], left_out: LeftOut, digest: bytes) -> None:
        """Add a piece: (split, first, last). `left_out` is counted here, and set to 0."""
        self.texts.append(text)
        self.characters += len(text)
        self._rows.append((*position, 0, len(text), left_out.missing, left_out.length, digest[:HASH_BYTES]))
        left_out.missing = left_out.length = 0

    def chunk(self) -> Chunk:
        """The pieces with their tokens."""
        pieces = np.array(self._rows, dtype=PIECE)
        around, end = self.how.around, list(self.how.around.end)
        encoded = _encode(self.how.tokenizer, self.texts)
        for number, (_, first, last, *_) in enumerate(self._rows):
            ids = around.opened(encoded[number]) if first else encoded[number]
            # a chat template may have written the end-of-text token itself
            if last and not (self.how.source.messages is not None and end and ids[-len(end) :] == end):
                ids = [*ids, *end]
            encoded[number] = ids
        pieces["tokens"] = [len(ids) for ids in encoded]
        ordered = (encoded[index] for index in np.argsort(pieces["split"], kind="stable"))
        return Chunk(pieces, np.fromiter(chain.from_iterable(ordered), dtype=self.how.dtype))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text without special tokens."""
    if not any(texts):
        return [[] for _ in texts]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # do not warn of documents longer than the model's context
    )
    return list(encoded["input_ids"])

"""Packing: tokenise a corpus once, split it by document, concatenate, cut into fixed-length rows, write shards and an index."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minitron.arguments import check_tokenizer, check_type, check_types
from minitron.data.documents import check_chat_template
from minitron.data.fields import ends_inside_chats
from minitron.data.in_parts import InParts, pack_in_parts
from minitron.data.merging import Chunks, write_rows
from minitron.data.parts import whole
from minitron.data.placing import Layout
from minitron.data.rows import INDEX, Rows, Split
from minitron.data.source_files import source_identity
from minitron.data.sources import TextSource
from minitron.data.special_tokens import DocumentTokens, document_tokens
from minitron.data.tokenising import Tokenising, nothing_full, tokenise
from minitron.errors import InputError, StorageError
from minitron.storage import fingerprint, is_committed, join, read_json, remove

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    source: TextSource | Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    target: str,
    *,
    seq_length: int,
    train_rows: int,
    heldout_rows: int,
    heldout_fraction: float | None = 0.05,
    heldout: TextSource | None = None,
    add_bos: bool | None = None,
    drop_duplicates: bool = False,
    shard_rows: int = SHARD_ROWS,
    in_parts: InParts | None = None,
    progress: Callable[[int, int], None] | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> Rows:
    """Tokenise text once into `target` (any fsspec path) and return its training rows.

    seq_length: tokens per row. train_rows, heldout_rows: number of rows in each split; reading stops when both are
    complete. The end-of-text token follows every document, and a row may contain several documents. Special tokens that
    are spelled out in the text become those tokens.

    source: one, or several that are blended by their weights: the next document is always taken from the source that has
    given the fewest training tokens for its weight. The index counts the tokens of each.

    add_bos: whether every document starts with a beginning-of-sequence token (BOS); None: if the tokenizer adds it by
    itself (`minitron.data.special_tokens`). With BOS, a row that starts inside a document also begins with BOS and the
    document continues after it, because the model has never seen a context that starts otherwise. BOS inside a row is
    predicted like any token; after the end-of-text token it is certain and adds almost nothing to the loss. BOS at the
    start of a row is never a target.

    heldout_fraction: a document is held out if the hash of its text falls in this fraction, so that the same text is never
    in both splits, whatever its name and order. None: heldout_rows / (train_rows + heldout_rows), with which both splits
    fill at about the same time. A larger fraction leaves training text unread, a smaller one held-out text. The index
    records it. heldout: the held-out rows are of this source instead; training documents with the same text as one that
    is held out are left out.

    drop_duplicates: keep only the first of documents with the same text (except for white space around it). The index counts
    all documents that were left out, by reason: "duplicates", "in_heldout", and "missing" and "length" as `TextSource` says.

    in_parts: tokenise parts of the sources independently, for example in other processes, and keep what is finished if the work
    is interrupted. By default all is done here, as far as the rows need it. The rows are the same.

    progress: called about once a second with (tokens written, tokens in total).

    before_commit: called before the rows are committed; it may raise a MinitronError to prevent that.

    A target that already contains the rows of the same request is opened as it is. Raises InputError if a source ends too
    early (with the number of rows it gave), and StorageError if `target` contains other rows.
    """
    sources = [source] if isinstance(source, TextSource) else source
    check_types("source", sources, TextSource)
    check_type("target", target, str, "the path of a folder")
    if heldout is not None:
        check_type("heldout", heldout, TextSource)
    texts = [*sources, *([heldout] if heldout else [])]
    for one in texts:
        check_chat_template(one, tokenizer)
    around = document_tokens(tokenizer, add_bos)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    layout = Layout(
        sources=tuple(one.label for one in sources),
        weights=tuple(one.weight for one in sources),
        heldout=heldout.label if heldout is not None else None,
        drop_duplicates=drop_duplicates,
        around=around,
        seq_length=seq_length,
        rows={"train": train_rows, "heldout": heldout_rows},
        shard_rows=shard_rows,
        dtype=np.dtype("<u2" if vocab_size <= 2**16 else "<u4"),
        vocab_size=vocab_size,
        request=_request(
            sources,
            heldout,
            tokenizer,
            around,
            seq_length,
            {"train": train_rows, "heldout": heldout_rows},
            heldout_fraction,
            shard_rows,
            drop_duplicates,
        ),
        ends_inside=any(one.messages for one in texts) and ends_inside_chats(tokenizer),
    )
    fraction = layout.request["heldout_fraction"]
    hows = [Tokenising(one, tokenizer, around, fraction, layout.dtype) for one in sources]
    heldout_how = Tokenising(heldout, tokenizer, around, 1.0, layout.dtype) if heldout else None
    if not is_committed(target):
        if in_parts is not None:
            identity = tokenizer_identity(tokenizer)
            pack_in_parts(layout, hows, heldout_how, identity, target, in_parts, progress, before_commit)
        else:
            _pack_here(layout, hows, heldout_how, target, progress, before_commit)
    elif in_parts is not None:
        before_commit()
        remove(in_parts.folder)  # the process that wrote the rows may have been killed before it did so
    # Also after writing: another process may have published its rows first.
    if read_json(join(target, INDEX)).get("request") != layout.request:
        raise StorageError(
            f"{target}: contains rows packed from another source or with other settings",
            "delete it or choose another folder",
        )
    return Rows.open(target, "train")


def _pack_here(
    layout: Layout,
    hows: Sequence[Tokenising],
    heldout: Tokenising | None,
    target: str,
    progress: Callable[[int, int], None] | None,
    before_commit: Callable[[], None],
) -> None:
    """Read and tokenise the text in this process, and stop when the rows are complete."""

    def streams(full: Callable[[Split], bool]) -> tuple[list[Chunks], Chunks | None]:
        # the blend depends on the number of tokens in every document
        skip = full if len(hows) == 1 else nothing_full
        chunks = [tokenise(how, whole(how.source), skip) for how in hows]
        return chunks, tokenise(heldout, whole(heldout.source)) if heldout else None

    reported = 0.0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if progress and (time.monotonic() - reported > 1 or done == total):
            progress(done, total)
            reported = time.monotonic()

    write_rows(layout, target, streams, report, before_commit)


def _request(
    sources: Sequence[TextSource],
    heldout: TextSource | None,
    tokenizer: PreTrainedTokenizerBase,
    around: DocumentTokens,
    seq_length: int,
    rows: dict[Split, int],
    heldout_fraction: float | None,
    shard_rows: int,
    drop_duplicates: bool,
) -> dict[str, Any]:
    """Everything that determines the rows, checked, as JSON values."""
    train_rows, heldout_rows = rows["train"], rows["heldout"]
    for name, value, least in (
        ("seq_length", seq_length, 2 + len(around.begin)),
        ("train_rows", train_rows, 1),
        ("heldout_rows", heldout_rows, 0),
        ("shard_rows", shard_rows, 1),
        ("number of sources", len(sources), 1),
    ):
        if value < least:
            raise InputError(f"{name} is {value}", f"use at least {least}")
    fraction = heldout_rows / (train_rows + heldout_rows) if heldout_fraction is None else heldout_fraction
    if heldout is not None:
        fraction = 0.0
        if not heldout_rows:
            raise InputError("heldout_rows is 0, but heldout is given", "use at least 1, or leave heldout out")
    elif not (0 <= fraction < 1) or (heldout_rows and fraction == 0):
        raise InputError(f"heldout_fraction is {fraction}", "use a number above 0 and below 1, such as 0.05")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token", "set its eos_token")
    # What older versions did not have is left out unless it is used, so that rows packed then match the same request.
    request: dict[str, Any] = {
        "tokenizer": tokenizer_identity(tokenizer),
        "eos": tokenizer.eos_token_id,
        "seq_length": seq_length,
        "rows": rows,
        "heldout_fraction": fraction,
        "shard_rows": shard_rows,
    }
    if len(sources) == 1:
        request["source"] = source_identity(sources[0])
    else:
        request["sources"] = [{"weight": one.weight, "source": source_identity(one)} for one in sources]
    if around.begin:
        request["begin"] = list(around.begin)
    if len(around.end) > 1:
        request["end"] = list(around.end)
    if heldout is not None:
        request["heldout"] = source_identity(heldout)
    if drop_duplicates:
        request["drop_duplicates"] = True
    if any(one.messages for one in [*sources, *([heldout] if heldout else [])]):
        request["chat_template"] = fingerprint(str(tokenizer.chat_template))
    return request

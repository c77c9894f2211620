"""The tokens of finished parts in a storage, where they wait to become rows: blocks of tokens, and a table of their pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from minitron.data.hub import is_local_folder
from minitron.data.parts import Part
from minitron.data.source_files import source_identity
from minitron.data.spans import located
from minitron.data.tokenising import PIECE, SPLITS, Chunk, Tokenising, joined, tokenise
from minitron.errors import InputError, MinitronError, StorageError
from minitron.storage import (
    absolute,
    exists,
    fingerprint,
    is_local,
    join,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)

FORMAT = 2
BLOCK_TOKENS = 2**22  # tokens in a file, so that large parts take little memory


@dataclass(frozen=True)
class PartTokens:
    """A finished part: files in a folder, named by `name`. `blocks` of them have its tokens, one the table of its pieces.

    tokens: their number in each split. failure: kind of error, problem and remedy, if the part could be read only up to an
    error; the next run reads it again.
    """

    name: str
    blocks: int
    tokens: dict[str, int]
    failure: tuple[Literal["input", "storage"], str, str] | None = None

    def raise_failure(self) -> None:
        """Raise the error that ended the part, if there was one."""
        if self.failure is not None:
            kind, problem, remedy = self.failure
            raise (InputError if kind == "input" else StorageError)(problem, remedy)


@dataclass(frozen=True)
class PartJob:
    """What the parts of one source have in common. number: of the source among those of the corpus."""

    how: Tokenising
    folder: str
    number: int
    identity: str

    @classmethod
    def of(cls, how: Tokenising, folder: str, number: int, tokenizer: str) -> PartJob:
        """tokenizer: its identity."""
        around = [list(how.around.begin), list(how.around.end)]
        settings = [FORMAT, PIECE.descr, source_identity(how.source), tokenizer, around, how.heldout_fraction]
        source = how.source
        if is_local(source.path) and (source.kind != "hub" or is_local_folder(source.path)):
            how = replace(how, source=replace(source, path=absolute(source.path)))  # workers have other working folders
        return cls(how, folder, number, fingerprint([*settings, how.dtype.str]))


def finished_part(job: PartJob, part: Part) -> PartTokens | None:
    """A part of an earlier run; None if it is not finished."""
    path = join(job.folder, f"{_name(job, part)}.json")
    return PartTokens(**read_json(path)) if exists(path) else None


def tokenise_part(job: PartJob, part: Part) -> PartTokens:
    """Tokenise a part into the job's folder, unless an earlier run has."""
    done = finished_part(job, part)
    if done is not None:
        return done
    name = _name(job, part)
    pending: list[Chunk] = []
    pieces: list[np.ndarray] = []  # of each block
    size = 0
    failure: MinitronError | None = None
    chunks = tokenise(job.how, part)
    while True:
        try:
            chunk = next(chunks, None)
        except MinitronError as error:
            failure, chunk = error, None
        if chunk is not None:
            pending.append(chunk)
            size += len(chunk.tokens)
        if pending and (chunk is None or size >= BLOCK_TOKENS):
            block = joined(pending)
            write_bytes(join(job.folder, block_name(name, len(pieces))), block.tokens.tobytes())
            pieces.append(block.pieces)
            pending, size = [], 0
        if chunk is None:
            break
    tokens = _write_table(join(job.folder, f"{name}-pieces.safetensors"), pieces)
    if failure is not None:
        kind: Literal["input", "storage"] = "storage" if isinstance(failure, StorageError) else "input"
        return PartTokens(name, len(pieces), tokens, (kind, failure.problem, failure.remedy))
    finished = PartTokens(name, len(pieces), tokens)
    write_json(join(job.folder, f"{name}.json"), {"name": name, "blocks": finished.blocks, "tokens": tokens})
    return finished


def _write_table(path: str, pieces: list[np.ndarray]) -> dict[str, int]:
    """Write the pieces of all blocks. Returns the number of tokens of each split."""
    table = np.concatenate([np.empty(0, PIECE), *pieces])
    counts = np.array([len(each) for each in pieces], np.int64)
    write_bytes(path, save({"pieces": table.view(np.uint8), "blocks": counts}))
    return {split: int(table["tokens"][table["split"] == number].sum()) for number, split in enumerate(SPLITS)}


def part_pieces(folder: str, part: PartTokens) -> np.ndarray:
    """The pieces of a finished part, of dtype LOCATED; its blocks are counted from 0. Raises StorageError for a damaged
    file."""
    path = join(folder, f"{part.name}-pieces.safetensors")
    try:
        tensors = load(read_bytes(path))
        pieces = np.ascontiguousarray(tensors["pieces"]).reshape(-1).view(PIECE)
        of_blocks = np.split(pieces, np.cumsum(tensors["blocks"])[:-1])
    except (SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path}: damaged ({error})", f"delete {folder} and run again") from error
    return np.concatenate([located(each, number) for number, each in enumerate(of_blocks)])


def block_name(part: str, number: int) -> str:
    """The name of the file that has the tokens of a block of a part: those of the first split, then those of the next."""
    return f"{part}-{number:04d}.bin"


def _name(job: PartJob, part: Part) -> str:
    files: list[Any] = [[path, within.start, within.end] for path, _, within in part.files]
    place = json.dumps([files, list(part.shard), part.commit])
    return f"{job.number:02d}-{fingerprint([job.identity, place])}"

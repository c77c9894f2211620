"""The chunks of finished parts in a storage, where they wait for the merge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from minitron.data.hub import is_local_folder
from minitron.data.parts import Part
from minitron.data.source_files import source_identity
from minitron.data.tokenising import PIECE, SPLITS, Chunk, Tokenising, tokenise
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

FORMAT = 1
BLOCK_TOKENS = 2**22  # tokens in a file, so that large parts take little memory


@dataclass(frozen=True)
class PartTokens:
    """A finished part: `blocks` files in a folder, named by `name`, with the number of tokens of each split.

    failure: kind of error, problem and remedy, if the part could be read only up to an error; the next run reads it again.
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
    tokens: dict[str, int] = dict.fromkeys(SPLITS, 0)
    pending: list[Chunk] = []
    blocks = size = 0
    failure: MinitronError | None = None
    chunks = tokenise(job.how, part)
    while True:
        try:
            chunk = next(chunks, None)
        except MinitronError as error:
            failure, chunk = error, None
        if chunk is not None:
            pending.append(chunk)
            size += sum(len(ids) for ids in chunk.tokens.values())
            for split in SPLITS:
                tokens[split] += len(chunk.tokens[split])
        if pending and (chunk is None or size >= BLOCK_TOKENS):
            write_bytes(_block(job.folder, name, blocks), _to_bytes(pending))
            pending, size, blocks = [], 0, blocks + 1
        if chunk is None:
            break
    if failure is not None:
        kind: Literal["input", "storage"] = "storage" if isinstance(failure, StorageError) else "input"
        return PartTokens(name, blocks, tokens, (kind, failure.problem, failure.remedy))
    write_json(join(job.folder, f"{name}.json"), {"name": name, "blocks": blocks, "tokens": tokens})
    return PartTokens(name, blocks, tokens)


def part_chunks(folder: str, part: PartTokens) -> Iterator[Chunk]:
    """The chunks of a finished part. Raises the error that it ended with, and StorageError for damaged files."""
    for number in range(part.blocks):
        path = _block(folder, part.name, number)
        try:
            tensors = load(read_bytes(path))
            pieces = np.ascontiguousarray(tensors["pieces"]).reshape(-1).view(PIECE)
            yield Chunk(pieces, {split: tensors[split] for split in SPLITS})
        except (SafetensorError, KeyError, ValueError) as error:
            raise StorageError(f"{path}: damaged ({error})", f"delete {folder} and run again") from error
    part.raise_failure()


def _block(folder: str, name: str, number: int) -> str:
    return join(folder, f"{name}-{number:04d}.safetensors")


def _name(job: PartJob, part: Part) -> str:
    files: list[Any] = [[path, within.start, within.end] for path, _, within in part.files]
    place = json.dumps([files, list(part.shard), part.commit])
    return f"{job.number:02d}-{fingerprint([job.identity, place])}"


def _to_bytes(chunks: list[Chunk]) -> bytes:
    pieces = np.concatenate([chunk.pieces for chunk in chunks])
    tensors: dict[str, np.ndarray] = {"pieces": pieces.view(np.uint8)}
    for split in SPLITS:
        tensors[split] = np.concatenate([chunk.tokens[split] for chunk in chunks])
    return bytes(save(tensors))

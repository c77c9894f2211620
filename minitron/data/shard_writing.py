"""Writing one shard of the rows by its plan, in any process, once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron.data.row_writer import with_begins
from minitron.data.rows import INDEX
from minitron.data.shard_plans import ShardPlan, batches, plan_path
from minitron.errors import StorageError
from minitron.storage import (
    access_errors,
    disk_errors,
    filesystem,
    is_local,
    join,
    local_path,
    publish,
    read_json_if_exists,
    remove,
    staging_folder,
    upload,
    write_json,
)
from minitron.storage.files import temporary_name
from minitron.storage.ranges import read_ahead, read_ranges

BATCH_TOKENS = 2**20  # that are written together


@dataclass(frozen=True)
class ShardJob:
    """What the shards have in common. folder: of the finished parts and of the plans. rows: where the shards are written."""

    folder: str
    rows: str
    dtype: np.dtype
    begin: tuple[int, ...]
    """Token ids at the start of a row that starts inside a document."""


@dataclass(frozen=True)
class Shard:
    """plan: SHA-256 of its plan."""

    name: str
    plan: str
    bytes: int


def write_shard(job: ShardJob, shard: Shard) -> dict[str, Any]:
    """Write a shard, unless an earlier run has, and return its entry in the manifest. Nobody sees a part of it.

    Raises StorageError for plans and blocks that are missing or truncated.
    """
    record = join(job.folder, f"{shard.name}.json")
    kept = read_json_if_exists(record)
    if kept is not None:
        if kept["plan"] == shard.plan and _size(join(job.rows, shard.name)) == shard.bytes:
            return dict(kept["entry"])
        remove(record)  # before the shard that it describes changes
    entry = _write(job, shard, ShardPlan.read(plan_path(job.folder, shard.name, shard.plan)))
    if entry["bytes"] != shard.bytes:
        raise StorageError(
            f"{shard.name}: has {entry['bytes']} bytes, not {shard.bytes}", f"delete {job.folder} and run again"
        )
    write_json(record, {"plan": shard.plan, "entry": entry})
    return entry


def publish_shards(rows: str, target: str, index: Mapping[str, Any], entries: Mapping[str, dict[str, Any]]) -> None:
    """Commit all shards in `rows`, which have these entries in the manifest, and their index as `target`."""
    with disk_errors(target):
        if is_local(target) and is_local(rows) and _same_disk(local_path(rows), local_path(target)):
            folder = local_path(rows)  # becomes the target
            _write_and_publish(folder, target, index, entries)
            return
        folder = staging_folder(target)
        try:
            if is_local(target):
                fs, inner = filesystem(rows)
                with access_errors(rows):
                    for name in entries:
                        fs.get_file(f"{inner}/{name}", str(folder / name))
            _write_and_publish(folder, target, index, entries)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write_and_publish(
    folder: Path, target: str, index: Mapping[str, Any], entries: Mapping[str, dict[str, Any]]
) -> None:
    write_json(str(folder / INDEX), index)
    publish(folder, target, {**entries, **upload(folder, target, INDEX)}, {"kind": "rows"})


def _same_disk(folder: Path, target: Path) -> bool:
    """Whether a folder can be renamed to a target, whose parent is created."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return folder.stat().st_dev == target.parent.stat().st_dev


def _size(path: str) -> int | None:
    """Bytes of a file; None if it does not exist."""
    fs, inner = filesystem(path)
    with access_errors(path):
        try:
            return int(fs.info(inner)["size"])
        except FileNotFoundError:
            return None


def _write(job: ShardJob, shard: Shard, plan: ShardPlan) -> dict[str, Any]:
    target = join(job.rows, shard.name)
    local = is_local(target)
    parent = local_path(job.folder) if local else Path(tempfile.gettempdir())
    if local:
        local_path(job.rows).mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(parent / shard.name)
    sha, size = hashlib.sha256(), 0
    with disk_errors(str(temporary)):
        try:
            with open(temporary, "xb") as file, closing(_tokens(job, plan)) as spans:
                for tokens, begins in batches(spans, plan.begins, BATCH_TOKENS):
                    data = with_begins(tokens, begins, job.begin).data
                    file.write(data)
                    sha.update(data)
                    size += data.nbytes
                file.flush()
                os.fsync(file.fileno())
            if local:
                os.replace(temporary, local_path(target))
            else:
                fs, inner = filesystem(target)
                with access_errors(target):
                    fs.put_file(str(temporary), inner)
        finally:
            temporary.unlink(missing_ok=True)
    return {"bytes": size, "sha256": sha.hexdigest()}


def _tokens(job: ShardJob, plan: ShardPlan) -> Generator[np.ndarray]:
    """The tokens of each span. Of every file, what lies between the plan's first and last token there is read once."""
    blocks, starts = plan.spans["block"], plan.spans["start"]
    ends = starts + plan.spans["tokens"]
    low = np.full(len(plan.files), np.iinfo(np.int64).max)
    high, last = np.zeros(len(plan.files), np.int64), np.zeros(len(plan.files), np.int64)
    np.minimum.at(low, blocks, starts)
    np.maximum.at(high, blocks, ends)
    np.maximum.at(last, blocks, np.arange(len(blocks)))
    size = job.dtype.itemsize

    def read(block: int) -> np.ndarray:
        path = join(job.folder, plan.files[block])
        [data] = read_ranges(path, [(int(low[block]) * size, int(high[block]) * size)])
        return np.frombuffer(data, job.dtype)

    _, first = np.unique(blocks, return_index=True)
    order = np.argsort(first).tolist()  # in which they are needed
    open_blocks: dict[int, np.ndarray] = {}
    # an abandoned generator would wait for its threads whenever it is collected
    with closing(read_ahead(read, order)) as coming:
        for number, (block, start, count) in enumerate(plan.spans.tolist()):
            if block not in open_blocks:
                open_blocks[block] = next(coming)
            yield open_blocks[block][start - low[block] : start - low[block] + count]
            if number == last[block]:
                del open_blocks[block]

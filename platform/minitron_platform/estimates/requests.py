"""Requests to an object store, estimated from sizes. `python -m benchmarks.storage_requests` counts those of a whole run."""

from __future__ import annotations

import math

from minitron.distill.teacher.shard_writing import SHARD_BYTES
from minitron.distill.teacher.shards import BLOCK_BYTES

PART_BYTES = 50 << 20  # larger files are sent and read in parts of this size by s3fs
STAGE = 20  # its lease and its record, and looking for what is done
MODEL_FILES = 6  # of a checkpoint besides the parts of its weights: config, tokenizer, manifest
TRIAL = 40  # reading inputs, measurements, result, and looking for what is done
CHECKPOINT = 10  # besides its files: listing, fencing, the manifest, the curve, deleting an earlier one
HEARTBEATS_PER_HOUR = 2 * 2 * 240  # of the leases of the run and of a stage: writing and checking every 15 s
RECORDS_PER_HOUR = 3 * 720  # of the run: writing, listing, and the position in MLflow, every 5 s
TENSORS = 2  # of a stored row, each read by a request of its own


def model_requests(size: int) -> int:
    """Reading or writing a checkpoint of `size` bytes."""
    return MODEL_FILES + math.ceil(size / PART_BYTES)


def checkpoint_requests(size: int, workers: int) -> int:
    """Writing a training checkpoint of `size` bytes, with a file for each worker."""
    return CHECKPOINT + workers + math.ceil(size / PART_BYTES)


def store_requests(size: int) -> int:
    """Writing the stored outputs of the teacher."""
    shards = math.ceil(size / SHARD_BYTES)
    return shards * (2 + math.ceil(min(size, SHARD_BYTES) / PART_BYTES))


def rows_requests(rows: int, row_bytes: int, *, consecutive: bool = False) -> int:
    """Reading what is stored of the teacher on rows. consecutive: whether they follow one another, as held-out rows do."""
    if not row_bytes:
        return 0
    block = max(1, BLOCK_BYTES // row_bytes) if consecutive else 1
    return TENSORS * math.ceil(rows / block)

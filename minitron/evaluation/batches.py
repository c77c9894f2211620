"""Number of requests of a benchmark that are computed together."""

from __future__ import annotations

from typing import Literal

import torch

from minitron.architecture import Architecture

BatchRows = int | Literal["auto"]
"""Rows of a batch, or "auto"."""
CPU_ROWS = 8
BATCH_TOKENS = 16_384
"""Tokens of a batch on a GPU, padding included; more do not make it faster."""
CACHE_BYTES = 4 << 30
"""Largest KV cache of texts that are generated together on a GPU, and of a prefix for all rows of a batch."""
GENERATED_ROWS = 64


def rows_of_batch(rows: BatchRows, longest: int, device: torch.device) -> int:
    """Rows that are computed together if the longest has `longest` tokens: `rows`; with "auto" 8 on a CPU, and on a GPU as many
    as have BATCH_TOKENS tokens."""
    if rows != "auto":
        return rows
    return CPU_ROWS if device.type == "cpu" else max(1, BATCH_TOKENS // longest)


def generated_rows(rows: BatchRows, architecture: Architecture, max_length: int, device: torch.device) -> int:
    """Texts of up to `max_length` tokens that are generated together: `rows`; with "auto" 8 on a CPU, and on a GPU up to
    GENERATED_ROWS, as far as CACHE_BYTES permit."""
    if rows != "auto":
        return rows
    if device.type == "cpu":
        return CPU_ROWS
    return max(1, min(GENERATED_ROWS, CACHE_BYTES // architecture.kv_cache_bytes(max_length)))


def prefixed_rows(rows: BatchRows, architecture: Architecture, prefix: int, device: torch.device) -> int:
    """Rows that are computed together after a cached prefix of `prefix` tokens: `rows`; with "auto" 8 on a CPU, and on a GPU as
    many as CACHE_BYTES permit."""
    if rows != "auto":
        return rows
    return CPU_ROWS if device.type == "cpu" else max(1, CACHE_BYTES // architecture.kv_cache_bytes(prefix))

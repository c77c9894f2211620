"""What a task of `run_parts` does in its worker; it imports nothing that takes long."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_put

from minitron.log_records import make_records_safe

NAMESPACE = "minitron_parts"  # in the key-value store of Ray's head

_kept: dict[str, Any] = {}  # the function and what its parts have in common, of the last call


def call(content: list[Any], part: Any, started: str) -> Any:
    """Run one part. content: a reference to (function, common). started: key that tells the driver that the part has begun."""
    _internal_kv_put(started, b"", namespace=NAMESPACE)
    make_records_safe()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each task has its own CPU
    (reference,) = content
    key = reference.hex()
    if key not in _kept:
        _kept.clear()
        _kept[key] = ray.get(reference)
    function, common = _kept[key]
    return function(common, part)

"""The results of every held-out row and every benchmark document of a model, which paired comparisons need."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from minitron import storage
from minitron.errors import StorageError, one_line
from minitron.evaluation.scores import Evaluated
from minitron.names import check_name

log = logging.getLogger(__name__)


def documents_path(quality: str) -> str:
    """The file of these results, beside the file of the model's means."""
    return f"{quality.removesuffix('.json')}-documents.json"


def write_rows(path: str, loss: list[float], kl: list[float]) -> None:
    """Store loss and KL of each held-out row, nats per token."""
    storage.write_json(path, {"loss": loss, "kl": kl, "tasks": {}})


def add_tasks(path: str, results: dict[str, Evaluated]) -> None:
    """Store the results of benchmarks. Nothing is stored beside means of an earlier version, which stored no rows."""
    stored = storage.read_json_if_exists(path)
    if stored is not None:
        stored["tasks"] |= {name: asdict(result) for name, result in results.items()}
        storage.write_json(path, stored)


class Documents:
    """The results of one model."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.rows: dict[str, list[float]] = {name: [float(value) for value in values[name]] for name in ("loss", "kl")}
        self.tasks = {str(name): Evaluated.from_dict(result) for name, result in values["tasks"].items()}


def read_documents(storage_root: str | None, path: str | None) -> Documents | None:
    """Those in a file of the storage; None if there is none, or, with a warning, if it cannot be used."""
    if storage_root is None or path is None:
        return None
    try:
        values = storage.read_json_if_exists(storage.join(storage_root, check_name(path, "a version's figures")))
        return None if values is None else Documents(values)
    except (KeyError, TypeError, ValueError, AttributeError, StorageError) as error:
        log.warning("%s: has no results of documents, and is not used (%s)", path, one_line(error))
        return None

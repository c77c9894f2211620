"""Records of finished stages, stage.json, which do not depend on where the storage is, so that it can be moved or copied.

In the file, a path inside the storage is "storage:" followed by the path relative to the storage's root. Earlier versions
wrote absolute paths; they are read too, and the old root is derived from them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from minitron import storage
from minitron.errors import StorageError
from minitron_platform.stages.stage import StageOutput

log = logging.getLogger(__name__)

RECORD = "stage.json"
INSIDE = "storage:"
_ABSOLUTE = re.compile(r"^(?P<root>.+)/stages/[a-z]+/[0-9a-f]{16}(/|$)")


@dataclass(frozen=True)
class Record:
    """A finished stage."""

    output: StageOutput
    seconds: float
    """Time that the stage took."""
    artifacts: list[str]
    """Files that must exist for the output to be of use."""


def write_record(root: str, folder: str, record: Record) -> None:
    """Write a stage's record into its `folder` in the storage at `root`. This marks the stage as finished."""
    written = {
        "outputs": record.output.model_dump(mode="json"),
        "seconds": record.seconds,
        "artifacts": record.artifacts,
    }
    storage.write_json(storage.join(folder, RECORD), _map_texts(written, lambda text: relative(root, text)))


def read_record(root: str, folder: str, output: type[StageOutput]) -> Record | None:
    """The record of a finished stage, with the present paths. None if the stage is not finished, or if the record is of an
    earlier version and does not fit the type `output`.

    Raises StorageError for a record that cannot be read, is not a stage's record, or has paths that lead out of the storage.
    """
    path = storage.join(folder, RECORD)
    stored = storage.read_json_if_exists(path)
    if stored is None:
        return None
    written = _checked(stored, path)
    matches = (_ABSOLUTE.match(text) for text in _texts(written))
    old_root = next((match["root"] for match in matches if match), root)

    def leads_out(inner: str) -> StorageError:
        return StorageError(f"{path}: {inner[:200]!r} leads out of the storage", f"delete {folder}, run again")

    def present_path(text: str) -> str:
        for start in (INSIDE, f"{old_root}/"):
            if text.startswith(start):
                inner = text.removeprefix(start)
                # no further checks, because messages that begin with a path are stored in the same form
                if ".." in inner.split("/"):
                    raise leads_out(inner)
                return storage.join(root, inner)
        return text

    record = _map_texts(written, present_path)
    try:
        found = output.model_validate(record["outputs"])
    except ValidationError as error:
        log.warning("%s: %s, so the stage runs again", path, _first_problem(error))
        return None
    for inner in (*found.paths(), *record["artifacts"]):
        if not inner.startswith(f"{root}/"):
            raise leads_out(inner)
    return Record(found, record["seconds"], record["artifacts"])


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"outputs.{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _checked(record: Any, path: str) -> dict[str, Any]:
    """The content of the file at `path`; raises StorageError if it is not a stage's record."""
    match record:
        case {"outputs": {"summary": str()}, "artifacts": [*artifacts], "seconds": int() | float()}:
            if all(isinstance(name, str) for name in artifacts):
                return dict(record)
    raise StorageError(f"{path}: not the record of a stage", "delete the file and run again")


def path_inside(root: str, path: str) -> str:
    """A path relative to the storage at `root`; unchanged if it is not inside it."""
    return path.removeprefix(f"{root}/")


def relative(root: str, text: str) -> str:
    """A path inside the storage at `root` in the form "storage:..."; any other text unchanged."""
    return INSIDE + path_inside(root, text) if text.startswith(f"{root}/") else text


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` applied to every string in it, except keys."""
    if isinstance(value, dict):
        return {key: _map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, except keys."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value

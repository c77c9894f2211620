"""What finished stages recorded: stage.json, in which paths are relative to the storage, so that it can be moved or copied.

In the file a path inside the storage is "storage:" and the path below its root. Records of versions that wrote absolute
paths are read too: their own paths say what the root was then.
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
    """A finished stage: what it hands on, how long it took, and the paths without which that is of no use."""

    output: StageOutput
    seconds: float
    artifacts: list[str]


def write_record(root: str, folder: str, record: Record) -> None:
    """Write a stage's record into its folder, in the storage at `root`; with it the stage is finished."""
    written = {
        "outputs": record.output.model_dump(mode="json"),
        "seconds": record.seconds,
        "artifacts": record.artifacts,
    }
    storage.write_json(storage.join(folder, RECORD), _mapped(written, lambda text: relative(root, text)))


def read_record(root: str, folder: str, output: type[StageOutput]) -> Record | None:
    """A finished stage's record with the paths as they are now; None where it is not finished, or where an earlier version
    finished it whose output lacks a field that is needed now.

    Raises StorageError for a record whose paths lead out of the storage, that has another form, or that can't be read."""
    path = storage.join(folder, RECORD)
    if not storage.exists(path):
        return None
    written = _checked(storage.read_json(path), path)
    before = next((found["root"] for text in _texts(written) if (found := _ABSOLUTE.match(text))), root)

    def present(text: str) -> str:
        for start in (INSIDE, f"{before}/"):
            if text.startswith(start):
                below = text.removeprefix(start)
                # not more than this is checked: messages that begin with a path are kept in the same form
                if ".." in below.split("/"):
                    raise StorageError(
                        f"{path}: {below[:200]!r} leads out of the storage", f"delete {folder}, run again"
                    )
                return storage.join(root, below)
        return text

    record = _mapped(written, present)
    try:
        return Record(output.model_validate(record["outputs"]), record["seconds"], record["artifacts"])
    except ValidationError as error:
        log.warning("%s: %s, so that the stage is done again", path, _first_problem(error))
        return None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"outputs.{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _checked(record: Any, path: str) -> dict[str, Any]:
    match record:
        case {"outputs": {"summary": str()}, "artifacts": [*artifacts], "seconds": int() | float()}:
            if all(isinstance(name, str) for name in artifacts):
                return dict(record)
    raise StorageError(f"{path}: not the record of a stage", "delete the file and run again")


def relative(root: str, text: str) -> str:
    """A path inside the storage at `root` in the form that does not depend on where that is; other text as it is."""
    return INSIDE + text.removeprefix(f"{root}/") if text.startswith(f"{root}/") else text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value

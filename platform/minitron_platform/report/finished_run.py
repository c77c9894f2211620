"""Reads the outputs of a finished run from its storage, on any machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from minitron import storage
from minitron.errors import InputError, StorageError, one_line
from minitron_platform.locations import Locations
from minitron_platform.recipes.load import load_recipe
from minitron_platform.stages.order import steps
from minitron_platform.stages.register import Register
from minitron_platform.stages.stage_records import read_record
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.events import check_key

log = logging.getLogger(__name__)

RESULTS = "results.json"


@dataclass(frozen=True)
class FinishedRun:
    """A run whose results are in a storage."""

    key: str
    recipe: str
    """Name of its recipe."""
    models: tuple[str, ...]
    """Models of its family."""


def finished_runs(locations: Locations) -> list[FinishedRun]:
    """The finished runs of a storage, the newest first. Results that cannot be read are left out, with a warning."""
    folder = storage.join(locations.storage, "runs")
    runs: list[tuple[float, FinishedRun]] = []
    for name in storage.names(folder):
        path = storage.join(folder, name, RESULTS)
        try:
            results = storage.read_json_if_exists(path)
            if results is None:
                continue
            fs, inner = storage.filesystem(path)
            changed = fs.modified(inner).timestamp()
            key, models = check_key(str(results["run"])), tuple(map(str, results["family"]))
        except (StorageError, InputError, KeyError, TypeError) as error:
            log.warning("%s: left out: %s", path, one_line(error))
            continue
        runs.append((changed, FinishedRun(key, key.rsplit("-", 1)[0], models)))
    return [run for _, run in sorted(runs, key=lambda entry: entry[0], reverse=True)]


def waits(locations: Locations, run_key: str) -> bool:
    """Whether a student of a finished run is to be registered later, as its results say.

    Raises StorageError if they are not the results of a run.
    """
    folder = locations.run(run_key)
    results = storage.read_json_if_exists(storage.join(folder, RESULTS))
    try:
        family = {} if results is None else results["family"]
        return any(outputs[Register.name]["version"] is None for outputs in family.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder) from error


def finished_run(locations: Locations, run_key: str) -> RunState:
    """The state of a finished run.

    Raises InputError if there is no finished run of this name, StorageError if the output of a stage is missing.
    """
    folder = locations.run(run_key)
    results = storage.read_json_if_exists(storage.join(folder, RESULTS))
    if results is None:
        raise InputError(f"run {run_key!r}: it has no {RESULTS} in {locations.storage}", "finish it with minitron run")
    recipe = load_recipe(storage.fetch_file(storage.join(folder, "recipe.yaml")))
    state = RunState(recipe, locations, run_key)
    for stage, member in steps(recipe):
        state.current = member
        try:
            written: dict[str, Any] = results["family"][member.model] if member else results["stages"]
            fingerprint = str(written[stage.name]["fingerprint"])
        except (KeyError, TypeError) as error:
            raise _damaged(folder) from error
        if not fingerprint.isalnum():
            raise _damaged(folder)
        record = read_record(locations.storage, locations.stage(stage.name, fingerprint), stage.output_type)
        if record is None:
            raise StorageError(
                f"{locations.stage(stage.name, fingerprint)}: the output of the stage is missing or of an earlier version",
                "run the recipe again, which repeats only what is missing",
            )
        state.finish(stage, record.output)
        state.seconds[record.output.fingerprint] = record.seconds
    return state


def _damaged(folder: str) -> StorageError:
    return StorageError(
        f"{storage.join(folder, RESULTS)}: not the results of a run", "delete it and run the recipe again"
    )

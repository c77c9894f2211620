"""Writes reports: of a run that has just finished, and again of finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron import storage
from minitron.errors import InputError
from minitron_platform.locations import Locations
from minitron_platform.report.finished_run import RESULTS, finished_run, finished_runs
from minitron_platform.report.page import page
from minitron_platform.report.variants import versions_with_variants
from minitron_platform.run_record import RunRecord
from minitron_platform.stages.context import Context
from minitron_platform.stages.stage import StageOutput
from minitron_platform.stages.state import RunState

REPORT = "report.html"


def write_report(context: Context, run_record: RunRecord) -> Path:
    """Write report.html and results.json to the run's local folder and to MLflow; returns the folder.

    Does nothing if the report of these results exists. A remote storage gets a copy.
    """
    folder = Path(context.locations.local_run(context.run_key))
    target = folder / RESULTS
    if not run_record.open and (folder / REPORT).exists() and target.exists() and target.read_text() == _text(context):
        return folder
    with context.console.working("report"):
        stored = write_results(context)
    if not run_record.open:
        run_record.reopen()
    for path in stored:
        run_record.log.artifact(path)
    return folder


def write_results(state: RunState) -> list[str]:
    """Write report.html and results.json to the run's local folder, with a copy in a remote storage; returns their paths in the
    storage."""
    content = {REPORT: page([state]).encode(), RESULTS: _text(state).encode()}
    folders = dict.fromkeys((state.locations.local_run(state.run_key), state.locations.run(state.run_key)))
    for folder in folders:
        for name, data in content.items():
            storage.write_bytes(storage.join(folder, name), data)
    return [storage.join(state.locations.run(state.run_key), name) for name in content]


def _text(state: RunState) -> str:
    """The content of results.json."""
    family = {model: _dumped(outputs) for model, outputs in state.family.items()}
    results = {"run": state.run_key, "stages": _dumped(state.shared), "family": family}
    return json.dumps(results, indent=1, sort_keys=True)


def _dumped(outputs: Mapping[str, StageOutput]) -> dict[str, Any]:
    return {name: output.model_dump(mode="json") for name, output in outputs.items()}


def write_page(locations: Locations, names: Sequence[str], out: str | None = None) -> str:
    """Write the report of a finished run again, or one page that compares several, with what was made of their students since;
    returns its path.

    names: of runs, of their recipes or of models of a family; the newest run that has the name is taken. out: file to write, by
    default that of the run, or comparison.html in the local folder of runs. Raises InputError for an unknown name, StorageError
    if the output of a stage is missing.
    """
    known = list(finished_runs(locations))
    keys: list[str] = []
    for name in names:
        key = next((run.key for run in known if name in (run.key, run.recipe, *run.models)), None)
        if key is None:
            finished = ", ".join(run.key for run in known) or "none"
            raise InputError(f"no finished run {name!r} in {locations.storage}", f"finished runs: {finished}")
        if key not in keys:
            keys.append(key)
    folder = Path(locations.local_run(keys[0]))
    path = out or str(folder / REPORT if len(keys) == 1 else folder.with_name("comparison.html"))
    states = [finished_run(locations, key) for key in keys]
    storage.write_bytes(path, page(states, {state.run_key: versions_with_variants(state) for state in states}).encode())
    return path

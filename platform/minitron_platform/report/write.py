"""Writes the report of a finished run, into its folder and to MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron import storage
from minitron_platform.report.finished_run import RESULTS
from minitron_platform.report.page import page
from minitron_platform.stages.context import Context
from minitron_platform.stages.stage import StageOutput

REPORT = "report.html"


def write_report(context: Context, run_record: Any) -> Path:
    """Write report.html and results.json to the run's local folder and to MLflow; returns the folder.

    Does nothing if the report of these results exists. A remote storage gets a copy.
    """
    folder = Path(context.locations.local_run(context.run_key))
    family = {model: _dumped(outputs) for model, outputs in context.family.items()}
    results = {"run": context.run_key, "stages": _dumped(context.shared), "family": family}
    text = json.dumps(results, indent=1, sort_keys=True)
    target = folder / RESULTS
    if not run_record.open and target.exists() and target.read_text() == text and (folder / REPORT).exists():
        return folder
    with context.console.working("report"):
        storage.write_bytes(str(folder / REPORT), page([context]).encode())
        storage.write_bytes(str(target), text.encode())
    if not run_record.open:
        run_record.reopen()
    for name in (REPORT, RESULTS, "recipe.yaml"):
        stored = storage.join(context.locations.run(context.run_key), name)
        if not storage.is_local(context.locations.storage):
            storage.write_bytes(stored, (folder / name).read_bytes())
        run_record.log.artifact(stored)
    return folder


def _dumped(outputs: Mapping[str, StageOutput]) -> dict[str, Any]:
    return {name: output.model_dump(mode="json") for name, output in outputs.items()}

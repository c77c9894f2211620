"""The stages of a recipe that are already finished in a storage."""

from __future__ import annotations

from typing import Any

import torch
from rich.markup import escape

from minitron import storage
from minitron_platform.console import Console
from minitron_platform.locations import Locations
from minitron_platform.recipes.build import data_values, training_values
from minitron_platform.recipes.schema import Recipe
from minitron_platform.stages.order import stage_names, steps
from minitron_platform.stages.stage import Stage
from minitron_platform.stages.stage_records import Record, read_record
from minitron_platform.stages.state import RunState


def run_key(recipe: Recipe) -> str:
    """Name of a run: the recipe's name, and a fingerprint of the recipe except its description, resources and tracking."""
    content = recipe.model_dump(by_alias=True, exclude={"resources", "description", "tracking"})
    content["distill"] = training_values(recipe.distill)
    content["search"]["training"] = training_values(recipe.search.training)
    for member, values in zip(recipe.family, content["family"], strict=True):
        values["distill"] = training_values(member.distill) if member.distill else None
    if recipe.correct and recipe.correct.training:
        content["correct"]["training"] = training_values(recipe.correct.training)
    content["data"] = data_values(recipe.data)
    content["evaluate"].pop("throughput", None)  # earlier runs always measured it
    if not recipe.evaluate.allow_code:
        del content["evaluate"]["allow_code"]  # it was added later, and earlier runs keep their names
    if recipe.evaluate.batch_rows == "auto":
        content["evaluate"]["batch_rows"] = 8  # the default of earlier runs
    return f"{recipe.name}-{storage.fingerprint(content)[:8]}"


def finished_record(state: RunState, stage: Stage[Any], folder: str, console: Console | None = None) -> Record | None:
    """The record of a stage whose results are in `folder`; None if it is not finished, if a file that it made is missing,
    or if it is no longer valid. A missing file is reported to `console`."""
    record = read_record(state.locations.storage, folder, stage.output_type)
    if record is None:
        return None
    missing = [path for path in record.artifacts if not storage.exists(path)]
    if missing:
        if console is not None:
            console.say(f"  [yellow]{escape(missing[0])} is missing: running the stage again[/]")
        return None
    return record if stage.is_valid(state, record.output) else None


def is_finished(recipe: Recipe, locations: Locations, dtype: torch.dtype) -> bool:
    """Whether every stage of `recipe` is finished in `locations`. dtype: that models of the run compute in.

    A storage where nothing is finished is seen at once; no model is read and no Ray started.
    """
    if not storage.exists(storage.join(locations.storage, "stages", stage_names()[-1])):
        return False
    state, _ = finished_stages(recipe, locations, dtype)
    return all(state.is_finished(stage, member) for stage, member in steps(recipe))


def finished_stages(recipe: Recipe, locations: Locations, dtype: torch.dtype) -> tuple[RunState, int]:
    """The state of `recipe` in `locations` up to the first stage that is not finished, and the bytes that this stage has
    already written. dtype: that models of the run compute in."""
    state = RunState(recipe, locations, run_key(recipe), auto_dtype=dtype)
    for stage, member in steps(recipe):
        state.current = member
        folder = locations.stage(stage.name, state.fingerprint(stage))
        record = finished_record(state, stage, folder)
        if record is None:
            return state, storage.size(folder)
        state.finish(stage, record.output)
        state.seconds[record.output.fingerprint] = record.seconds
    return state, 0

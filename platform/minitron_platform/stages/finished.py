"""What is already done of a recipe."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from minitron import storage
from minitron_platform.console import Console
from minitron_platform.locations import Locations
from minitron_platform.recipes.schema import Recipe
from minitron_platform.stages.order import steps
from minitron_platform.stages.stage import Stage
from minitron_platform.stages.stage_records import Record, read_record
from minitron_platform.stages.state import RunState


def run_key(recipe: Recipe) -> str:
    """The name of a run: the recipe's, and the fingerprint of all it says except how it is spread over machines."""
    content = recipe.model_dump(by_alias=True, exclude={"resources", "description"})
    if recipe.data.bos is None:
        del content["data"]["add_bos"]  # a key that came later: runs made before keep their names
    return f"{recipe.name}-{storage.fingerprint(content)[:8]}"


def finished_record(state: RunState, stage: Stage[Any], folder: str, console: Console | None = None) -> Record | None:
    """What a finished stage recorded, if all that it made is still there; `console` is told why it is done again."""
    record = read_record(state.locations.storage, folder, stage.output_type)
    if record is None:
        return None
    gone = [path for path in record.artifacts if not storage.exists(path)]
    if gone:
        if console is not None:
            console.say(f"  [yellow]{escape(gone[0])} is gone: making it again[/]")
        return None
    return record if stage.is_valid(state, record.output) else None


def finished_stages(recipe: Recipe, locations: Locations) -> tuple[RunState, int]:
    """What is already done of `recipe` in `locations`, as far as it can be known without doing any, and the bytes that the
    next stage has already written."""
    state = RunState(recipe, locations, run_key(recipe))
    for stage, member in steps(recipe):
        state.current = member
        folder = locations.stage(stage.name, state.fingerprint(stage))
        record = finished_record(state, stage, folder)
        if record is None:
            return state, storage.size(folder)
        state.finish(stage, record.output)
    return state, 0

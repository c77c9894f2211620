"""Targets: what is stored of the teacher, computed once and read by everything that distils.

Hidden states of all rows; where the distillation runs the teacher itself, of the training rows that the search reads. Of
training rows it may be the likeliest tokens instead.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from minitron import storage
from minitron.data import rows_of_steps
from minitron.device import DTYPES
from minitron.distill import TopKTeacher, store_hidden, store_top_k
from minitron.distill.inputs import DistillInputs
from minitron.distill.teacher.stored import stored_bytes
from minitron.pruning.source import PruningSource
from minitron_platform.recipes.build import pruning_source
from minitron_platform.stages.context import Context

VERSION = 2


def inputs(context: Context) -> dict[str, Any]:
    top_k, steps = context.recipe.targets.top_k, _steps(context)
    return {
        **({"top_k": top_k} if top_k else {}),
        **({"steps": steps} if steps else {}),
        "teacher": context.done["correct"]["id"],
        "dtype": context.done["teacher"]["dtype"],
        "train": context.done["data"]["train"],
        "heldout": context.done["data"]["heldout"],
    }


def _steps(context: Context) -> list[int] | None:
    """(rows of a step, steps, seed) of the search, if the rows that it trains are all that is stored."""
    search, data = context.recipe.search.training, context.done["data"]
    enough = search.batch_rows * search.steps >= data["train_tokens"] // data["seq_length"]
    online = context.recipe.targets.mode == "online" and not enough
    return [search.batch_rows, search.steps, search.seed] if online else None


def run(context: Context, folder: str) -> dict[str, Any]:
    outputs = {"train": storage.join(folder, "train"), "heldout": storage.join(folder, "heldout")}
    top_k, steps = context.recipe.targets.top_k, _steps(context)
    reads = materials(context, outputs)
    train, heldout = reads.open_rows("train"), reads.open_rows("heldout")
    numbers = rows_of_steps(len(train), *steps) if steps else None
    num_train = len(train) if numbers is None else len(numbers)
    hidden_size = context.done["teacher"]["architecture"]["hidden_size"]
    value_bytes = DTYPES[context.done["teacher"]["dtype"]].itemsize
    num_rows = num_train + len(heldout)
    size = stored_bytes(num_train, train.seq_length, hidden_size, value_bytes, top_k)
    size += stored_bytes(len(heldout), train.seq_length, hidden_size, value_bytes)
    what = f"{num_rows:,} rows" + (", of training those of the search" if numbers is not None else "")
    teacher: list[nn.Module] = []

    def load_once() -> nn.Module:
        if not teacher:
            context.console.say(f"  what is stored of the teacher: {what}, {size / 1e6:,.0f} MB")
            context.console.status("loading the teacher")
            teacher.append(reads.load_teacher())
        return teacher[0]

    options: dict[str, Any] = {"key": reads.targets_key("heldout"), "progress": context.console.counter("heldout rows")}
    computed = store_hidden(load_once, heldout, outputs["heldout"], **options)
    options = {"key": reads.targets_key("train"), "progress": context.console.counter("train rows"), "numbers": numbers}
    if top_k:
        computed += store_top_k(load_once, train, outputs["train"], top_k, **options)
    else:
        computed += store_hidden(load_once, train, outputs["train"], **options)
    found = {**outputs, "rows_computed": computed, "rows_stored": num_rows}
    summary = f"teacher run on {computed:,} of {what} · {size / 1e6:,.0f} MB"
    if not top_k:
        return {**found, "summary": summary}
    lost = TopKTeacher(outputs["train"], reads.targets_key("train")).mass_lost()
    return {
        **found,
        "mass_lost_mean": lost.mean,
        "mass_lost_worst": lost.worst,
        "summary": f"{summary} · beyond the {top_k} likeliest tokens a probability of {lost.mean:.3g} is lost on average, "
        f"{lost.worst:.3g} at worst",
    }


def record(context: Context, outputs: dict[str, Any]) -> None:
    """What the likeliest tokens leave out, in the run's record."""
    lost = {name: value for name, value in outputs.items() if name.startswith("mass_lost")}
    if lost:
        context.log("targets").metrics(lost, step=0)


def materials(context: Context, targets: dict[str, Any] | None = None) -> DistillInputs:
    """What distillations of this run read."""
    done = context.done
    stored = targets or done["targets"]
    return DistillInputs(
        teacher=done["correct"]["folder"],
        teacher_id=done["correct"]["id"],
        dtype=done["teacher"]["dtype"],
        rows=done["data"]["folder"],
        train_targets=stored["train"],
        heldout_targets=stored["heldout"],
        top_k=context.recipe.targets.top_k,
    )


def origin(context: Context) -> PruningSource:
    """What the family's current model is cut from."""
    return pruning_source(
        context.recipe.calibrate,
        folder=context.base["folder"],
        scores=context.done["calibrate"]["scores"],
        dtype=context.done["teacher"]["dtype"],
        rows=context.done["data"]["folder"],
    )

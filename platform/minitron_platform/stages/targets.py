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
from minitron_platform.estimates.memory import targets_memory
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.recipes import build, schema
from minitron_platform.stages.base import pruning_base
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.context import Context
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.data import Data
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher


class TargetsOutput(StageOutput):
    train: ArtifactPath
    """What is stored of the teacher for the training rows."""
    heldout: ArtifactPath
    """For the held-out rows, always hidden states."""
    rows_computed: int
    rows_stored: int
    mass_lost_mean: float | None = None
    """Probability beyond the stored top-k tokens, a mean over positions; None where hidden states are stored."""
    mass_lost_worst: float | None = None


class Targets(Stage[TargetsOutput]):
    name = "targets"
    version = 2
    per_model = False
    output_type = TargetsOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        top_k, steps, data = state.recipe.targets.top_k, _steps(state), state.output(Data)
        return {
            **({"top_k": top_k} if top_k else {}),
            **({"steps": steps} if steps else {}),
            "teacher": state.output(Correct).id,
            "dtype": state.output(Teacher).dtype,
            "train": data.train,
            "heldout": data.heldout,
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        cost = outlook.targets
        return Estimate(
            f"{cost.rows * outlook.recipe.data.seq_length:,} tokens, once through the teacher",
            flops=cost.stored_flops,
            bytes=cost.bytes,
            memory=targets_memory(outlook.recipe, outlook.teacher, outlook.value_bytes),
        )

    def run(self, context: Context, folder: str) -> TargetsOutput:
        train_folder = storage.join(folder, "train")
        heldout_folder = storage.join(folder, "heldout")
        top_k, steps = context.recipe.targets.top_k, _steps(context)
        reads = _inputs(context, train_folder, heldout_folder)
        train, heldout = reads.open_rows("train"), reads.open_rows("heldout")
        numbers = rows_of_steps(len(train), *steps) if steps else None
        num_train = len(train) if numbers is None else len(numbers)
        num_rows = num_train + len(heldout)
        hidden_size = context.output(Teacher).architecture.hidden_size
        value_bytes = DTYPES[context.output(Teacher).dtype].itemsize
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

        options: dict[str, Any] = {
            "key": reads.targets_key("heldout"),
            "progress": context.console.counter("heldout rows"),
        }
        computed = store_hidden(load_once, heldout, heldout_folder, **options)
        options = {
            "key": reads.targets_key("train"),
            "progress": context.console.counter("train rows"),
            "numbers": numbers,
        }
        if top_k:
            computed += store_top_k(load_once, train, train_folder, top_k, **options)
        else:
            computed += store_hidden(load_once, train, train_folder, **options)
        output = TargetsOutput(
            train=train_folder,
            heldout=heldout_folder,
            rows_computed=computed,
            rows_stored=num_rows,
            summary=f"teacher run on {computed:,} of {what} · {size / 1e6:,.0f} MB",
        )
        if not top_k:
            return output
        lost = TopKTeacher(train_folder, reads.targets_key("train")).mass_lost()
        beyond = (
            f"beyond the {top_k} likeliest tokens a probability of {lost.mean:.3g} is lost on average, "
            f"{lost.worst:.3g} at worst"
        )
        return output.model_copy(
            update={
                "mass_lost_mean": lost.mean,
                "mass_lost_worst": lost.worst,
                "summary": f"{output.summary} · {beyond}",
            }
        )

    def metrics(self, output: TargetsOutput) -> dict[str, float]:
        """What the top-k tokens leave out."""
        lost = {"mass_lost_mean": output.mass_lost_mean, "mass_lost_worst": output.mass_lost_worst}
        return {name: value for name, value in lost.items() if value is not None}


def _steps(state: RunState) -> list[int] | None:
    """(rows of a step, steps, seed) of the search, if the rows that it trains are all that is stored."""
    search, data = state.recipe.search.training, state.output(Data)
    enough = search.batch_rows * search.steps >= data.train_tokens // data.seq_length
    online = state.recipe.targets.mode == "online" and not enough
    return [search.batch_rows, search.steps, search.seed] if online else None


def distill_inputs(state: RunState) -> DistillInputs:
    """What distillations of this run read."""
    targets = state.output(Targets)
    return _inputs(state, targets.train, targets.heldout)


def _inputs(state: RunState, train_targets: str, heldout_targets: str) -> DistillInputs:
    correct = state.output(Correct)
    return DistillInputs(
        teacher=correct.folder,
        teacher_id=correct.id,
        dtype=state.output(Teacher).dtype,
        rows=state.output(Data).folder,
        train_targets=train_targets,
        heldout_targets=heldout_targets,
        top_k=state.recipe.targets.top_k,
    )


def pruning_source(state: RunState) -> PruningSource:
    """What the family's current model is cut from."""
    return build.pruning_source(
        state.recipe.calibrate,
        folder=pruning_base(state).folder,
        scores=state.output(Calibrate).scores,
        dtype=state.output(Teacher).dtype,
        rows=state.output(Data).folder,
    )

"""Targets: the teacher's outputs on all rows, computed and stored once for the search and the distillations.

They are its final hidden states, or for training rows the logits of its top-k tokens. If the full distillation runs the
teacher itself, only those training rows that the search reads are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from minitron import storage
from minitron.data import Split, rows_of_steps
from minitron.device import DTYPES
from minitron.distill import TopKTeacher, store_hidden, store_top_k
from minitron.distill.inputs import DistillInputs
from minitron.distill.teacher.shard_writing import Writing
from minitron.distill.teacher.stored import stored_bytes
from minitron.processes import total
from minitron.pruning.source import PruningSource
from minitron_platform.estimates.memory import targets_memory
from minitron_platform.estimates.node_memory import targets_work
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.estimates.phases import targets_parts
from minitron_platform.recipes import build, schema
from minitron_platform.stages.base import pruning_base
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.context import Context
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.data import Data
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher
from minitron_platform.workers import models
from minitron_platform.workers.worker import Worker


class TargetsOutput(StageOutput):
    train: ArtifactPath
    """Folder of the teacher's outputs on training rows: hidden states or top-k logits."""
    heldout: ArtifactPath
    """Folder of the teacher's hidden states on held-out rows."""
    rows_computed: int
    """Rows that the workers computed after their last start; the others were stored before, by an interrupted run or by
    workers that have died."""
    rows_stored: int
    mass_lost_mean: float | None = None
    """Probability of the tokens outside the stored top-k, mean over positions; None if hidden states are stored."""
    mass_lost_worst: float | None = None
    """Maximum over positions."""


class Targets(Stage[TargetsOutput]):
    name = "targets"
    version = 2
    per_model = False
    output_type = TargetsOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        top_k = state.recipe.targets.top_k
        search_steps = _search_steps(state)
        data = state.output(Data)
        return {
            **({"top_k": top_k} if top_k else {}),
            **({"steps": search_steps} if search_steps else {}),
            "teacher": state.output(Correct).id,
            "dtype": state.output(Teacher).dtype,
            "train": data.train,
            "heldout": data.heldout,
            **state.attention(),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        cost = outlook.teacher_cost
        return Estimate(
            f"{cost.rows * outlook.recipe.data.seq_length:,} tokens, one forward pass of the teacher",
            bytes=cost.bytes,
            memory=targets_memory(outlook.recipe, outlook.teacher, outlook.value_bytes),
            node=targets_work(outlook.teacher, outlook.value_bytes, cost.bytes, outlook.resources),
            parts=targets_parts(outlook),
        )

    def run(self, context: Context, folder: str) -> TargetsOutput:
        train_folder = storage.join(folder, "train")
        heldout_folder = storage.join(folder, "heldout")
        top_k = context.recipe.targets.top_k
        search_steps = _search_steps(context)
        inputs = _distill_inputs(context, train_folder, heldout_folder)
        train = inputs.open_rows("train")
        heldout = inputs.open_rows("heldout")
        train_rows = rows_of_steps(len(train), *search_steps) if search_steps else None
        num_rows = (len(train) if train_rows is None else len(train_rows)) + len(heldout)
        rows_text = f"{num_rows:,} rows" + (
            "" if train_rows is None else " (of the training rows, only those that the search reads)"
        )
        hidden_size = context.output(Teacher).architecture.hidden_size
        value_bytes = DTYPES[context.output(Teacher).dtype].itemsize
        size = stored_bytes(num_rows - len(heldout), train.seq_length, hidden_size, value_bytes, top_k)
        size += stored_bytes(len(heldout), train.seq_length, hidden_size, value_bytes)
        storing = _Storing(inputs, train_rows, f"storing the teacher's outputs on {rows_text}, {size / 1e6:,.0f} MB")
        computed = context.workers.compute(_store, storing)
        output = TargetsOutput(
            train=train_folder,
            heldout=heldout_folder,
            rows_computed=computed,
            rows_stored=num_rows,
            summary=f"{_origin(computed, num_rows, rows_text)} · {size / 1e6:,.0f} MB",
        )
        if not top_k:
            return output
        lost = TopKTeacher(train_folder, inputs.targets_key("train")).mass_lost()
        lost_text = (
            f"the top {top_k} tokens leave out a probability of {lost.mean:.3g} on average, {lost.worst:.3g} at worst"
        )
        return output.model_copy(
            update={
                "mass_lost_mean": lost.mean,
                "mass_lost_worst": lost.worst,
                "summary": f"{output.summary} · {lost_text}",
            }
        )

    def metrics(self, output: TargetsOutput) -> dict[str, float]:
        """Probability that the top-k tokens leave out."""
        lost = {"mass_lost_mean": output.mass_lost_mean, "mass_lost_worst": output.mass_lost_worst}
        return {name: value for name, value in lost.items() if value is not None}


@dataclass(frozen=True)
class _Storing:
    inputs: DistillInputs
    train_rows: list[int] | None
    """Numbers of the training rows to store; None for all."""
    announcement: str
    """Line for the user before the teacher runs."""


def _store(task: _Storing, worker: Worker) -> int:
    """Store the teacher's outputs that are missing, each process its share; returns the number of rows it ran on."""
    inputs = task.inputs
    teacher: list[nn.Module] = []

    def load_once() -> nn.Module:
        if not teacher:
            worker.progress.say(f"  {task.announcement}")
            worker.progress.status("loading the teacher")
            teacher.append(models.load(worker, inputs.teacher, inputs.dtype))
        return teacher[0]

    computed = 0
    splits: tuple[tuple[Split, str], ...] = (("heldout", inputs.heldout_targets), ("train", inputs.train_targets))
    for split, folder in splits:
        rows = inputs.open_rows(split)
        numbers = task.train_rows if split == "train" else None
        how: Writing = {
            "numbers": numbers,
            "rank": worker.rank,
            "world": worker.count,
            "before_commit": worker.before_commit,
            "progress": worker.progress.counter(f"{split} rows"),
        }
        key, documents = inputs.targets_key(split), inputs.documents()
        if split == "train" and inputs.top_k:
            computed += store_top_k(load_once, rows, folder, inputs.top_k, key=key, documents=documents, **how)
        else:
            computed += store_hidden(load_once, rows, folder, key=key, documents=documents, **how)
    return total(computed, worker.count > 1)


def _origin(computed: int, num_rows: int, rows_text: str) -> str:
    """For the user: which of the stored rows are new. Workers that were restarted know only what they found stored."""
    if computed == num_rows:
        return f"teacher ran on {computed:,} of {rows_text}"
    return f"teacher's outputs on {rows_text} · {num_rows - computed:,} reused from before the workers' last start"


def _search_steps(state: RunState) -> list[int] | None:
    """[rows in a step, steps, seed] of the search, if only the training rows that it reads are stored; None for all rows."""
    search = state.recipe.search.training
    data = state.output(Data)
    reads_all_rows = search.batch_rows * search.steps >= data.train_tokens // data.seq_length
    if state.recipe.targets.mode != "online" or reads_all_rows:
        return None
    return [search.batch_rows, search.steps, search.seed]


def distill_inputs(state: RunState) -> DistillInputs:
    """Rows, teacher and stored targets for the distillations of this run."""
    targets = state.output(Targets)
    return _distill_inputs(state, targets.train, targets.heldout)


def _distill_inputs(state: RunState, train_targets: str, heldout_targets: str) -> DistillInputs:
    correct = state.output(Correct)
    return DistillInputs(
        teacher=correct.folder,
        teacher_id=correct.id,
        dtype=state.output(Teacher).dtype,
        rows=state.output(Data).folder,
        train_targets=train_targets,
        heldout_targets=heldout_targets,
        top_k=state.recipe.targets.top_k,
        separate_documents=state.separate_documents,
    )


def pruning_source(state: RunState) -> PruningSource:
    """The checkpoint that the family's current model is pruned from, and how to prune it."""
    return build.pruning_source(
        state.recipe.calibrate,
        folder=pruning_base(state).folder,
        scores=state.output(Calibrate).scores,
        dtype=state.output(Teacher).dtype,
        rows=state.output(Data).folder,
        separate_documents=state.separate_documents,
    )

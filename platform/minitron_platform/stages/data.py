"""Data: text, tokenised and packed once into rows, and what the teacher says of how they begin."""

from __future__ import annotations

from typing import Any

from minitron import storage
from minitron.data import DocumentTokens, Rows, pack, source_identity
from minitron.device import DTYPES, device
from minitron.evaluation.beginning import BosLosses, bos_losses
from minitron.models import load_model, load_tokenizer
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import document_tokens, text_source
from minitron_platform.stages.context import Context
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher

PROBE_ROWS, PROBE_TOKENS = 4, 128  # held-out rows, and tokens of each, that the teacher is measured on
WORSE = 0.1  # nats per token: a loss that is higher by as much is worth a warning


class DataOutput(StageOutput):
    folder: ArtifactPath
    """The packed rows."""
    train: str
    """Fingerprint of the training rows."""
    heldout: str
    """Fingerprint of the held-out rows."""
    seq_length: int
    train_tokens: int
    heldout_tokens: int
    loss_with_bos: float | None = None
    """The teacher's on some held-out rows, nats per token; None where its tokenizer has no BOS."""
    loss_without_bos: float | None = None


class Data(Stage[DataOutput]):
    name = "data"
    version = 1
    per_model = False
    output_type = DataOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        data, around = state.recipe.data, _around(state)
        return {
            "teacher": state.output(Teacher).id,
            "source": source_identity(text_source(data)),
            "data": data.model_dump(exclude={"add_bos"}),  # what came of it counts, however it was said
            "begin": list(around.begin),
            "end": list(around.end),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        data = outlook.recipe.data
        rows = data.train_rows + data.heldout_rows
        return Estimate(
            f"{rows:,} rows of {data.seq_length} tokens", bytes=rows * data.seq_length * 4, start_up_seconds=15
        )

    def run(self, context: Context, folder: str) -> DataOutput:
        data = context.recipe.data
        target = storage.join(folder, "rows")
        context.console.status("reading text")
        tokenizer = load_tokenizer(storage.fetch(context.output(Teacher).folder))
        rows = pack(
            text_source(data),
            tokenizer,
            target,
            seq_length=data.seq_length,
            train_rows=data.train_rows,
            heldout_rows=data.heldout_rows,
            heldout_fraction=data.heldout_fraction,
            add_bos=data.bos,
            progress=context.console.counter("tokens"),
        )
        heldout = Rows.open(target, "heldout")
        around = _around(context)
        measured = _measured(context, heldout, around)
        return DataOutput(
            folder=target,
            train=rows.fingerprint,
            heldout=heldout.fingerprint,
            seq_length=rows.seq_length,
            train_tokens=len(rows) * rows.seq_length,
            heldout_tokens=len(heldout) * rows.seq_length,
            loss_with_bos=measured.with_bos if measured else None,
            loss_without_bos=measured.without_bos if measured else None,
            summary=f"{len(rows):,} training and {len(heldout):,} held-out rows of {rows.seq_length} tokens"
            + _beginning(around, measured),
        )

    def metrics(self, output: DataOutput) -> dict[str, float]:
        """The teacher's loss with BOS and without."""
        losses = {"loss_with_bos": output.loss_with_bos, "loss_without_bos": output.loss_without_bos}
        return {name: loss for name, loss in losses.items() if loss is not None}


def _around(state: RunState) -> DocumentTokens:
    return document_tokens(state.recipe.data, state.output(Teacher).document)


def _measured(context: Context, heldout: Rows, around: DocumentTokens) -> BosLosses | None:
    """The teacher's loss on the beginnings of some held-out rows; the worse choice is warned of."""
    if not around.begin and around.bos is None:
        return None
    context.console.status("measuring the teacher with BOS and without")
    teacher = context.output(Teacher)
    model = load_model(storage.fetch(teacher.folder), DTYPES[teacher.dtype]).to(device())
    rows = heldout.take(range(min(PROBE_ROWS, len(heldout))))[:, :PROBE_TOKENS]
    measured = bos_losses(model, rows, around)
    if measured:
        worse_by = measured.with_bos - measured.without_bos
        if not around.begin:
            worse_by = -worse_by
        if worse_by > WORSE:
            other = "false" if around.begin else "true"
            context.console.say(
                f"  [yellow]the teacher predicts this text {_with(around)} BOS worse by {worse_by:.2f} nats per token than "
                f"{_with(around, other=True)}: set data.add_bos: {other}[/]"
            )
    return measured


def _with(around: DocumentTokens, *, other: bool = False) -> str:
    return "with" if bool(around.begin) != other else "without"


def _beginning(around: DocumentTokens, measured: BosLosses | None) -> str:
    """How rows begin, for the summary."""
    if measured is None:
        return ""
    here, there = measured.without_bos, measured.with_bos
    if around.begin:
        loss = f"the teacher's loss {there:.3f}, without it {here:.3f}"
        return f" · documents and rows that start inside one begin with BOS ({loss})"
    return f" · no BOS (the teacher's loss {here:.3f}, with it {there:.3f})"

"""Data: tokenise the text and pack it once into rows; measure the teacher with and without a BOS token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from minitron import storage
from minitron.data import DocumentTokens, InParts, Rows, TextSource, pack
from minitron.data.hub import is_local_folder
from minitron.data.in_parts import Run, in_this_process
from minitron.data.python_docs import python_identity
from minitron.data.rows import SourceCounts
from minitron.device import cores
from minitron.evaluation.beginning import BosLosses, bos_losses
from minitron.models import load_tokenizer
from minitron_platform.console import seconds
from minitron_platform.estimates.memory import probe_memory
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.estimates.phases import data_parts
from minitron_platform.estimates.teacher import TOKEN_BYTES
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import (
    HELDOUT,
    all_text_sources,
    data_values,
    document_tokens,
    has_chats,
    text_sources,
)
from minitron_platform.stages.context import Context
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher, chat_template_input
from minitron_platform.workers import models
from minitron_platform.workers.worker import Progress, Worker

# the part of the held-out rows that the teacher is measured on with and without a BOS token
PROBE_ROWS = 4
PROBE_TOKENS = 128
TASK_TOKENS = 50_000_000  # the start of Ray and of its workers takes as long as a minute of tokenising
PYTHON_DOCS = "python-docs"  # a kind of text
REASONS = {  # why documents are not in the rows
    "missing": "without text",
    "length": "too short or too long",
    "duplicates": "duplicates",
    "in_heldout": "that are held out",
}
WARNING_MARGIN = 0.1  # nats per token by which the worse choice is worse before there is a warning


class SourceText(BaseModel):
    """What of a source of text is in the rows."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Kind and path."""
    heldout: bool
    """Whether only the held-out rows are of it, and no others."""
    tokens: int
    documents: int
    left_out: dict[str, int]
    """As `DataOutput.left_out`."""

    @classmethod
    def of(cls, counts: SourceCounts) -> SourceText:
        return cls(
            name=counts.source,
            heldout=counts.heldout,
            tokens=sum(counts.tokens.values()),
            documents=sum(counts.documents.values()),
            left_out=dict(counts.left_out),
        )

    def text(self, total: int) -> str:
        """In words. total: tokens of all sources."""
        share = f" ({self.tokens / total:.1%})" if self.tokens < total else ""
        left_out = [f"{count:,} {REASONS[reason]}" for reason, count in self.left_out.items()]
        return (
            f"{'held-out text: ' if self.heldout else ''}{self.name} {self.tokens:,} tokens{share} of {self.documents:,} "
            f"document{'' if self.documents == 1 else 's'}" + (f", left out: {', '.join(left_out)}" if left_out else "")
        )


class DataOutput(StageOutput):
    folder: ArtifactPath
    """Folder of the packed rows."""
    train: str
    """Fingerprint of the training rows."""
    heldout: str
    """Fingerprint of the held-out rows."""
    seq_length: int
    train_tokens: int
    heldout_tokens: int
    loss_with_bos: float | None = None
    """The teacher's loss on some held-out rows in nats per token; None if its tokenizer has no BOS token."""
    loss_without_bos: float | None = None
    sources: tuple[SourceText, ...] = ()
    """What is in the rows of each source, also of the held-out text's own; empty if an earlier version packed them."""
    left_out: dict[str, int] = Field(default_factory=dict)
    """Number of documents that are not in the rows, by reason, see `minitron.data.pack`."""


class Data(Stage[DataOutput]):
    name = "data"
    version = 1
    per_model = False
    output_type = DataOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        data = state.recipe.data
        special_tokens = _special_tokens(state)
        identities = [state.texts[key] for key in text_sources(data)]
        heldout = state.texts.get(HELDOUT)
        values = data_values(data)
        for key in ("add_bos", "separate_documents"):  # the effect of the first is in the two last entries
            values.pop(key, None)
        return {
            "teacher": state.output(Teacher).id,
            "source": identities[0] if len(identities) == 1 else identities,
            **({"heldout": heldout} if heldout else {}),
            "data": values,
            **chat_template_input(state, has_chats(data)),
            "begin": list(special_tokens.begin),
            "end": list(special_tokens.end),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        data = outlook.recipe.data
        rows = data.train_rows + data.heldout_rows
        tokens = rows * data.seq_length
        in_tasks = _in_tasks(data)
        return Estimate(
            f"{rows:,} rows of {data.seq_length} tokens" + (", packed by tasks" if in_tasks else ""),
            bytes=(2 if in_tasks else 1) * tokens * TOKEN_BYTES,  # parts are kept until the rows are written
            start_up_seconds=15,
            memory=probe_memory(outlook.teacher, outlook.value_bytes, PROBE_ROWS * (PROBE_TOKENS + 1)),
            parts=data_parts(outlook, in_tasks=in_tasks),
        )

    def run(self, context: Context, folder: str) -> DataOutput:
        target = storage.join(folder, "rows")
        rows = _packed(context, target, storage.join(folder, "parts"))
        heldout = Rows.open(target, "heldout")
        special_tokens = _special_tokens(context)
        sources = tuple(map(SourceText.of, rows.sources))
        losses = _bos_losses(context, heldout, special_tokens)
        if losses:
            _warn_of_worse_choice(context, losses, special_tokens)
        return DataOutput(
            folder=target,
            train=rows.fingerprint,
            heldout=heldout.fingerprint,
            seq_length=rows.seq_length,
            train_tokens=len(rows) * rows.seq_length,
            heldout_tokens=len(heldout) * rows.seq_length,
            loss_with_bos=losses.with_bos if losses else None,
            loss_without_bos=losses.without_bos if losses else None,
            sources=sources,
            left_out=rows.index.get("left_out", {}),
            summary=f"{len(rows):,} training and {len(heldout):,} held-out rows of {rows.seq_length} tokens"
            + "".join(f" · {source.text(sum(one.tokens for one in sources))}" for source in sources)
            + (_bos_text(losses, special_tokens) if losses else ""),
        )

    def metrics(self, output: DataOutput) -> dict[str, float]:
        """The teacher's loss with and without BOS, in nats per token; documents that are not in the rows, by reason; the same,
        tokens and documents of each source."""
        losses = {"loss_with_bos": output.loss_with_bos, "loss_without_bos": output.loss_without_bos}
        counts = {f"left_out.{reason}": count for reason, count in output.left_out.items()}
        for number, source in enumerate(output.sources):
            name = "heldout_source" if source.heldout else f"source_{number}"
            counts |= {f"tokens.{name}": source.tokens, f"documents.{name}": source.documents}
            counts |= {f"left_out.{reason}.{name}": count for reason, count in source.left_out.items()}
        return {name: loss for name, loss in losses.items() if loss is not None} | counts


def _in_tasks(data: schema.Data) -> bool:
    """Whether the text is packed in parts, which tasks of Ray may share, and which are kept if the run is killed."""
    kinds = {source.kind for source in all_text_sources(data).values()}
    return (data.train_rows + data.heldout_rows) * data.seq_length >= TASK_TOKENS and kinds != {PYTHON_DOCS}


def _packed(context: Context, target: str, parts: str) -> Rows:
    """The training rows, packed into `target`. parts: folder for finished parts of the text."""
    data = context.recipe.data
    tokens = (data.train_rows + data.heldout_rows) * data.seq_length
    here = context.workers.computes_here()
    sources = {key: _pinned(source, context.texts[key]) for key, source in all_text_sources(data).items()}
    kinds = {source.kind for source in sources.values()}
    packing = _Packing(
        data=data,
        sources=sources,
        teacher=context.output(Teacher).folder,
        target=target,
        parts=parts if _in_tasks(data) else None,
        python=python_identity() if PYTHON_DOCS in kinds else None,
    )
    started = time.monotonic()
    new = not storage.is_committed(target)
    context.console.status("reading text")
    # python-docs is the text of this machine's Python
    if packing.parts and (cores() > 1 if here else PYTHON_DOCS not in kinds):
        _pack(packing, context.console, context.fences.check, _run_in_tasks(context))
    elif not context.workers.compute(_pack_in_worker, packing, everywhere=False):
        context.console.say(
            "  [yellow]the workers have other Python packages than the run's own process, which reads its own "
            "documentation[/]"
        )
        _pack(packing, context.console, context.fences.check)
    if new:
        took = time.monotonic() - started
        context.console.say(f"  packed {tokens:,} tokens in {seconds(took)}, {tokens / took:,.0f} tokens/s")
    return Rows.open(target, "train")


def _pinned(source: TextSource, identity: dict[str, Any]) -> TextSource:
    """A dataset on the hub at the commit of its identity; other sources as they are."""
    on_hub = source.kind == "hub" and not is_local_folder(source.path)
    return replace(source, revision=identity["commit"]) if on_hub else source


@dataclass(frozen=True)
class _Packing:
    data: schema.Data
    sources: dict[str, TextSource]
    """The texts by their recipe keys."""
    teacher: str
    """Checkpoint folder."""
    target: str
    parts: str | None
    """Folder for finished parts of the text; None for a text that is small enough to start again."""
    python: dict[str, Any] | None = field(repr=False)
    """Identity of the Python that the text documents, if it is python-docs."""


def _pack_in_worker(task: _Packing, worker: Worker) -> bool:
    """Pack the rows in this process. False, without doing so, if the text is the documentation of another Python."""
    if task.python is not None and python_identity() != task.python:
        return False
    _pack(task, worker.progress, worker.before_commit)
    return True


def _pack(task: _Packing, progress: Progress, before_commit: Callable[[], None], run: Run = in_this_process) -> None:
    """Pack the rows. before_commit: as `Worker.before_commit`. run: makes the calls for the parts of the text."""
    data = task.data
    pack(
        [source for key, source in task.sources.items() if key != HELDOUT],
        load_tokenizer(storage.fetch(task.teacher, weights=False)),
        task.target,
        seq_length=data.seq_length,
        train_rows=data.train_rows,
        heldout_rows=data.heldout_rows,
        heldout_fraction=data.heldout_fraction,
        heldout=task.sources.get(HELDOUT),
        add_bos=data.bos,
        drop_duplicates=data.drop_duplicates,
        in_parts=InParts(task.parts, _Fenced(run, before_commit)) if task.parts else None,
        progress=progress.counter("tokens"),
        before_commit=before_commit,
    )


@dataclass(frozen=True)
class _Fenced:
    """Makes the calls of `run` as long as `before_commit` allows it. A call that has begun may still write its part, which has
    the same content whoever writes it."""

    run: Run
    before_commit: Callable[[], None]

    def __call__(self, function: Callable[[Any, Any], Any], common: Any, parts: Iterable[Any]) -> Iterator[Any]:
        return self.run(_fenced, (self.before_commit, function, common), parts)


def _fenced(common: tuple[Callable[[], None], Callable[[Any, Any], Any], Any], part: Any) -> Any:
    before_commit, function, own = common
    before_commit()
    return function(own, part)


def _run_in_tasks(context: Context) -> Run:
    """Makes calls in tasks of Ray."""
    from minitron_platform.workers.parts import busy, run_parts

    resources = context.ensure_ray()
    if busy():
        context.workers.make_room()
    return partial(
        run_parts,
        max_failures=resources.max_failures,
        say=context.console.say,
        look=context.workers.look,
    )


def _special_tokens(state: RunState) -> DocumentTokens:
    """The special tokens around each document."""
    return document_tokens(state.recipe.data, state.output(Teacher).document)


def _bos_losses(context: Context, heldout: Rows, special_tokens: DocumentTokens) -> BosLosses | None:
    """The teacher's loss on the beginnings of some held-out rows; None if its tokenizer has no BOS token."""
    if not special_tokens.begin and special_tokens.bos is None:
        return None
    teacher = context.output(Teacher)
    rows = heldout.take(range(min(PROBE_ROWS, len(heldout))))[:, :PROBE_TOKENS]
    probe = _Probe(teacher.folder, teacher.dtype, rows, special_tokens)
    return context.workers.compute(_measure, probe)


@dataclass(frozen=True)
class _Probe:
    teacher: str
    """Checkpoint folder."""
    dtype: str
    rows: Tensor = field(repr=False)
    """int64 [PROBE_ROWS, PROBE_TOKENS], or fewer."""
    special_tokens: DocumentTokens


def _measure(task: _Probe, worker: Worker) -> BosLosses | None:
    """The teacher's loss with and without a BOS token."""
    worker.progress.status("measuring the teacher with and without BOS")
    model = models.load(worker, task.teacher, task.dtype)
    return bos_losses(model, task.rows, task.special_tokens)


def _warn_of_worse_choice(context: Context, losses: BosLosses, special_tokens: DocumentTokens) -> None:
    """Print a warning if the teacher predicts the text better with the other value of `data.add_bos`."""
    chosen = ("with BOS", losses.with_bos)
    other = ("without BOS", losses.without_bos)
    remedy = "data.add_bos: false"
    if not special_tokens.begin:
        chosen, other = other, chosen
        remedy = "data.add_bos: true"
    difference = chosen[1] - other[1]
    if difference > WARNING_MARGIN:
        context.console.say(
            f"  [yellow]the teacher predicts this text worse {chosen[0]} than {other[0]}, by {difference:.2f} nats per token: "
            f"set {remedy}[/]"
        )


def _bos_text(losses: BosLosses, special_tokens: DocumentTokens) -> str:
    """How rows begin, for the summary."""
    if special_tokens.begin:
        return (
            " · documents and rows that start inside one begin with BOS "
            f"(the teacher's loss {losses.with_bos:.3f}, without BOS {losses.without_bos:.3f})"
        )
    return f" · no BOS (the teacher's loss {losses.without_bos:.3f}, with BOS {losses.with_bos:.3f})"

"""Addresses of everything that a distillation reads; the same for every candidate, trial and worker."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from torch import nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.data import DocumentBoundaries, Rows, Split
from minitron.device import DTYPES, device
from minitron.distill.teacher.live import LiveTeacher, Targets
from minitron.distill.teacher.shards import Shards
from minitron.distill.teacher.stored import StoredTeacher, store_key
from minitron.distill.teacher.top_k import TopKTeacher
from minitron.evaluation import HeldoutMetrics, heldout_metrics
from minitron.evaluation.heldout import batches_of, rows_per_batch
from minitron.logits import Head
from minitron.meta_models import MetaModel, load_onto, open_model, read_head
from minitron.processes import dealt
from minitron.pruning.source import PruningSource

_open_once = lru_cache(maxsize=2)(Shards)


@dataclass(frozen=True)
class DistillInputs:
    """Addresses of a teacher checkpoint, of packed rows, and of the teacher's stored targets for both splits.

    The targets are final hidden states; for the training rows, if `top_k` is not 0, the teacher's top-k tokens. teacher_id:
    hash of the teacher's weights. dtype: "bfloat16" or "float32", the dtype in which models compute. separate_documents:
    whether tokens attend only to their own document of a row.
    """

    teacher: str
    teacher_id: str
    dtype: str
    rows: str
    train_targets: str
    heldout_targets: str
    top_k: int = 0
    separate_documents: bool = False

    def load_teacher(self) -> nn.Module:
        """The teacher on `minitron.device.device()`."""
        return load_onto(storage.fetch(self.teacher), DTYPES[self.dtype], device())

    def open_teacher(self) -> MetaModel:
        """The teacher on the meta device, and the checkpoint that its weights are read from."""
        return open_model(storage.fetch(self.teacher), DTYPES[self.dtype])

    def teacher_head(self) -> Head:
        """The teacher's head on `minitron.device.device()`; the rest of the teacher is not read."""
        return read_head(storage.fetch(self.teacher), DTYPES[self.dtype]).to(device())

    def open_rows(self, split: Split) -> Rows:
        """The packed rows of a split, opened once."""
        if split not in self._opened:
            self._opened[split] = Rows.open(self.rows, split)
        return self._opened[split]

    @cached_property
    def _opened(self) -> dict[Split, Rows]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name) for field in fields(self)
        }  # whoever gets it opens the rows itself

    def targets_key(self, split: Split) -> str:
        """The key of a split's stored targets (see `minitron.distill.teacher.stored.store_key`)."""
        top_k = self.top_k if split == "train" else 0
        rows = self.open_rows(split).fingerprint
        return store_key(self.teacher_id, rows, self.dtype, top_k, separate_documents=self.separate_documents)

    def documents(self) -> DocumentBoundaries | None:
        """The boundaries of the documents to separate; None if they are not separated."""
        return self.open_rows("train").boundaries if self.separate_documents else None

    def targets(self, teacher_head: Head) -> Targets:
        """The teacher's stored targets for the training rows."""
        if self.top_k:
            return TopKTeacher(self.train_targets, self.targets_key("train"))
        return StoredTeacher(self.train_targets, teacher_head, self.targets_key("train"))

    def heldout_teacher(self, teacher_head: Head) -> StoredTeacher | LiveTeacher:
        """The teacher's stored final hidden states of the held-out rows. A process opens the store once."""
        key = self.targets_key("heldout")
        return StoredTeacher(self.heldout_targets, teacher_head, key, open_store=_open_once)

    def source(self, origin: PruningSource) -> tuple[nn.Module, Head]:
        """The model from which students are pruned, and the teacher's head; they share weights if the model is the teacher."""
        source = origin.load()
        return source, Head.of(source) if origin.folder == self.teacher else self.teacher_head()

    def student(self, origin: PruningSource, architecture: Architecture) -> tuple[nn.Module, Head]:
        """A student of `architecture`, pruned from `origin`, and the teacher's head."""
        source, head = self.source(origin)
        return origin.prune(source, architecture), head

    def heldout(
        self, model: nn.Module, teacher_head: Head, limit: int | None = None, *, together: bool = False
    ) -> HeldoutMetrics:
        """Loss of `model` and KL to the teacher on the first `limit` held-out rows (None: all); together: by all processes of
        torch.distributed, each a part."""
        rows = self.open_rows("heldout")
        tokens = rows.take(range(min(limit or len(rows), len(rows))))
        targets = self.heldout_teacher(teacher_head)
        batches = batches_of(len(tokens), rows_per_batch(rows.seq_length))
        own = [range(batch.start, batch.stop) for batch, _ in dealt(batches, model, together=together)]
        targets.prefetch([row for batch in own for row in batch])
        return heldout_metrics(
            model,
            tokens,
            teacher_hidden=lambda part: targets.hidden(range(part.start, part.stop), tokens[part]),
            teacher_head=teacher_head,
            documents=self.documents(),
            together=together,
        )

"""Everything a distillation reads, by address: the same for every candidate, trial and worker."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.data import Rows, Split
from minitron.device import DTYPES, device
from minitron.distill.store import StoredTeacher, store_key
from minitron.evaluation import HeldoutMetrics, heldout_metrics
from minitron.logits import Head
from minitron.models import load_model
from minitron.origin import Origin


@dataclass(frozen=True)
class Materials:
    """Addresses of a teacher checkpoint, the packed rows, and the stored hidden states of both splits; `teacher_id` names
    the teacher's weights, `dtype` is what models compute in."""

    teacher: str
    teacher_id: str
    dtype: str
    rows: str
    train_targets: str
    heldout_targets: str

    def load_teacher(self) -> nn.Module:
        return load_model(storage.fetch(self.teacher), DTYPES[self.dtype]).to(device())

    def open_rows(self, split: Split) -> Rows:
        return Rows.open(self.rows, split)

    def targets_key(self, split: Split) -> str:
        return store_key(self.teacher_id, self.open_rows(split).fingerprint, self.dtype)

    def targets(self, split: Split, teacher_head: Head) -> StoredTeacher:
        """The stored hidden states of a split, "train" or "heldout"."""
        folder = self.train_targets if split == "train" else self.heldout_targets
        return StoredTeacher(folder, teacher_head, self.targets_key(split))

    def source(self, origin: Origin) -> tuple[nn.Module, Head]:
        """What `origin` cuts students from, and the teacher's head."""
        source = origin.load()
        return source, Head.of(source if origin.folder == self.teacher else self.load_teacher())

    def student(self, origin: Origin, architecture: Architecture) -> tuple[nn.Module, Head]:
        """A student of `architecture`, cut from `origin`, and the teacher's head."""
        source, head = self.source(origin)
        return origin.prune(source, architecture), head

    def heldout(self, model: nn.Module, teacher_head: Head, limit: int | None = None) -> HeldoutMetrics:
        """Loss and KL to the teacher on the first `limit` held-out rows, by default all."""
        rows = self.open_rows("heldout")
        tokens = rows.take(range(min(limit or len(rows), len(rows))))
        targets = self.targets("heldout", teacher_head)
        return heldout_metrics(
            model,
            tokens,
            teacher_hidden=lambda part: targets.hidden(range(part.start, part.stop), tokens[part]),
            teacher_head=teacher_head,
        )

"""The interface of a teacher in a distillation, and the teacher that is a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron.arguments import check_model, check_type
from minitron.data import DocumentBoundaries
from minitron.distill.sharding import shard_teacher_
from minitron.logits import Head
from minitron.meta_models import InMemory, Weights, emptied, read_
from minitron.models import final_hidden


class TopK(NamedTuple):
    """A teacher's k most likely tokens at each of N positions, the likeliest first."""

    log_probs: Tensor
    """float32 [N, k], of the whole vocabulary's distribution."""
    tokens: Tensor
    """int32 or int64 [N, k]."""


class TeacherBatch(TypedDict, total=False):
    """The teacher's arguments of `linear_logit_loss` for N tokens: hidden states and head, or the k most likely tokens."""

    teacher_hidden: Tensor
    teacher_head: Head
    teacher_log_sum_exp: Tensor
    teacher_top_k: TopK


class Targets(Protocol):
    """What a student is compared with."""

    def batch(self, indices: Sequence[int], input_ids: Tensor) -> TeacherBatch:
        """The teacher's outputs for the rows with these numbers and tokens, int64 [n, seq_length]; N = n · seq_length."""
        ...

    def prefetch(self, indices: Sequence[int]) -> None:
        """Prepare rows that will be needed soon."""
        ...


class LiveTeacher:
    """A teacher in memory that runs on every batch, without gradients.

    documents: its attention is restricted to the documents of a row.
    shard: with several processes, split its layers over them (FSDP2); each layer is gathered while it runs. All processes must
        then request the same number of batches. The head and all else outside the layers is in every process.
    device: where it runs; by default, the device of `model`.
    weights: where a `model` on the meta device is read from. Each process reads its own rows only.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        documents: DocumentBoundaries | None = None,
        shard: bool = False,
        device: torch.device | None = None,
        weights: Weights | None = None,
    ) -> None:
        check_model("model", model)
        if documents is not None:
            check_type("documents", documents, DocumentBoundaries)
        self.documents = documents
        self.sharded = shard and dist.is_initialized() and dist.get_world_size() > 1
        device = device or next(model.parameters()).device
        dtype = next(model.parameters()).dtype
        if self.sharded and weights is None:
            model, weights = emptied(model), InMemory(model)
        self.model = model.eval().requires_grad_(False)
        if self.sharded:
            shard_teacher_(self.model, device)
        if weights is not None:
            read_(self.model, weights, dtype, device)
        self.model.to(device)
        self.head = Head.of(self.model)

    def batch(self, indices: Sequence[int], input_ids: Tensor) -> TeacherBatch:
        return {"teacher_hidden": self.hidden(indices, input_ids).flatten(0, 1), "teacher_head": self.head}

    def prefetch(self, indices: Sequence[int]) -> None:
        """Nothing to prepare: the model runs on each batch."""

    @torch.no_grad()
    def hidden(self, indices: Sequence[int], input_ids: Tensor) -> Tensor:
        """Final hidden states [n, seq_length, hidden] of these tokens."""
        return final_hidden(self.model, input_ids, self.documents)

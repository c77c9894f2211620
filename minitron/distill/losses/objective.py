"""The training objective of a distillation: student, teacher and the losses between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from minitron.data import DocumentBoundaries
from minitron.distill.losses import Losses
from minitron.distill.losses.divergences import IGNORED
from minitron.distill.losses.intermediate import IntermediateLosses, dynamic_alpha, recorded
from minitron.distill.losses.logits import linear_logit_loss
from minitron.distill.teacher.live import LiveTeacher, Targets, TeacherBatch
from minitron.distill.timing import Stopwatch
from minitron.errors import InputError
from minitron.logits import Head
from minitron.meta_models import Weights
from minitron.models import final_hidden, head_of


class Objective(nn.Module):
    """The objective `losses` of a student.

    targets: the teacher's outputs; None if the losses need no teacher. channels: the teacher's embedding channels that the
    student kept, int64 [hidden], if known (see `IntermediateLosses`). documents: if given, tokens attend only to their own
    document. weights: the weights of a student on the meta device. Raises InputError for a missing teacher, for stored
    targets if the losses need more than the final hidden states, and for a live teacher with other `documents`.
    """

    def __init__(
        self,
        student: nn.Module,
        targets: Targets | None,
        losses: Losses,
        channels: Tensor | None = None,
        watch: Stopwatch | None = None,
        documents: DocumentBoundaries | None = None,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.targets = targets if losses.needs_teacher else None
        self.losses = losses
        self.documents = documents
        self.watch = watch or Stopwatch(head_of(student).device)
        self.intermediate: IntermediateLosses | None = None
        if losses.needs_teacher and targets is None:
            raise InputError("targets: none, but the losses need a teacher", "give targets, or use logits: none")
        if isinstance(targets, LiveTeacher) and targets.documents != documents:
            raise InputError(
                f"documents: the teacher keeps {_apart(targets.documents)} apart, the student {_apart(documents)}",
                "give both the same, such as the rows' `boundaries`",
            )
        if losses.needs_live_teacher:
            if not isinstance(targets, LiveTeacher):
                raise InputError(
                    f"targets: a {type(targets).__name__} has only the teacher's final hidden states, but the losses "
                    "hidden, embedding, attention and mlp_input need the teacher itself",
                    "give a LiveTeacher, or leave these losses out",
                )
            self.intermediate = IntermediateLosses(student, targets.model, losses, channels, weights)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is trained: the student's parameters that require a gradient, and the projection
        of the intermediate losses. Raises InputError if the student has none."""
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        if not named:
            raise InputError("the student has no parameter that requires a gradient", "call requires_grad_(True) on it")
        return named + (list(self.intermediate.named_parameters("intermediate")) if self.intermediate else [])

    def forward(
        self, indices: Sequence[int], tokens: Tensor, stored: TeacherBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """(loss, parts) of some rows. indices: their numbers; tokens: int64 [n, seq_length]; stored: the teacher's outputs for
        them, if they were already read.

        The loss is a scalar with a gradient. The parts, float64 [4] without a gradient, are the loss, the divergence, the
        cross-entropy and L_is. All are means over the rows.
        """
        teacher, teacher_outputs = self._teacher(indices, tokens) if stored is None else (stored, {})
        self.watch.lap("teacher")
        modules = self.intermediate.student_modules if self.intermediate else ()
        with recorded(self.student, modules) as outputs:
            hidden = final_hidden(self.student, tokens, self.documents)
        self.watch.lap("student")
        logits = linear_logit_loss(
            hidden.flatten(0, 1),
            Head.of(self.student),
            self.losses,
            labels=functional.pad(tokens[:, 1:], (0, 1), value=IGNORED).flatten(),
            **teacher,
        )
        loss = logits.loss
        intermediate = torch.zeros(len(tokens), device=tokens.device)
        if self.intermediate:
            intermediate = self.intermediate(outputs, teacher_outputs)
            # for each row, so that the result does not depend on the micro-batch size and the number of processes
            dynamic = dynamic_alpha(logits.divergence.view(tokens.shape).mean(dim=1), intermediate)
            alpha = dynamic if self.losses.alpha is None else self.losses.alpha
            loss = loss + (alpha * intermediate).mean()
        parts = (loss, logits.divergence.double().mean(), logits.cross_entropy, intermediate.mean())
        self.watch.lap("loss")
        return loss, torch.stack([part.detach().double() for part in parts])

    def _teacher(self, indices: Sequence[int], tokens: Tensor) -> tuple[TeacherBatch, dict[str, Tensor]]:
        if self.targets is None:
            return {}, {}
        if self.intermediate is None:
            return self.targets.batch(indices, tokens), {}
        assert isinstance(self.targets, LiveTeacher)
        with recorded(self.targets.model, self.intermediate.teacher_modules) as outputs:
            return self.targets.batch(indices, tokens), outputs


def _apart(documents: DocumentBoundaries | None) -> str:
    return "none" if documents is None else f"those that end with token {documents.end}"

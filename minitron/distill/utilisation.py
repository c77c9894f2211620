"""Model FLOP utilisation of a distillation.

utilisation = tokens per second · (F_teacher + (2 + t) · F_student) / (processes · peak FLOP/s of one process's device)

F is the FLOPs per token of one forward pass, head included (`Architecture.flops_per_token`). The student's backward pass takes
F_student for the gradients of the activations and t · F_student for those of the weights, where t is the share of its
parameters that is trained. F_teacher is that of the head alone if the teacher's hidden states are stored, and 0 if its top-k
tokens are. Recomputation by activation checkpointing is not counted. Reports have the share of two peaks: one measured with
products of large random matrices (about three quarters of the data sheet's on an H100), and that of the GPU's data sheet, which
most publications use.
"""

from __future__ import annotations

from torch import nn

from minitron.architecture import Architecture
from minitron.distill.teacher.live import LiveTeacher, Targets
from minitron.distill.teacher.stored import StoredTeacher


def training_flops_per_token(student: nn.Module, targets: Targets | None, seq_length: int) -> float:
    """FLOPs of student and teacher per token in a training step, for rows of `seq_length` tokens."""
    sizes = [(p.numel(), p.requires_grad) for p in student.parameters()]
    trained = sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)
    flops = (2 + trained) * Architecture.from_config(student.config).flops_per_token(seq_length)
    if isinstance(targets, LiveTeacher):
        return flops + Architecture.from_config(targets.model.config).flops_per_token(seq_length)
    return flops + (2 * targets.head.weight.numel() if isinstance(targets, StoredTeacher) else 0)

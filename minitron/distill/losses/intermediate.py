"""Losses between hidden states of student and teacher (arXiv 2407.14679 section 2.4, L_is)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minitron.architecture import Architecture
from minitron.distill.losses import Losses, mapped_layers
from minitron.distill.losses.relations import relation_loss
from minitron.errors import InputError
from minitron.meta_models import InMemory, Weights

NEGLIGIBLE = 1e-6  # an L_is below this is the rounding of 1 - cos


@contextmanager
def recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the latest output of each named module of `model` inside the context: {name: output}."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _module, _arguments, output: outputs.__setitem__(name, output)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class IntermediateLosses(nn.Module):
    """L_is of each row: the sum of the intermediate losses in `losses`.

    The student's hidden states (after a norm), embeddings and MLP inputs are mapped to the teacher's width by one linear
    `projection`, float32 [d_t, d_s], which is trained with the student. Its initial value is the identity, or selects the
    teacher's `channels`, int64 [d_s], that the student kept. If the widths differ and no channels are given, it is the
    least-squares map between the models' embeddings. Raises InputError for layers that do not exist and invalid channels.
    """

    projection: nn.Parameter | None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: Losses,
        channels: Tensor | None = None,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        own = Architecture.from_config(student.config)
        other = Architecture.from_config(teacher.config)
        self.how = losses.hidden_loss
        self.projected: list[tuple[str, str]] = []  # (student's module, teacher's module)
        if losses.embedding:
            self.projected.append((_embedding(own), _embedding(other)))
        for text in losses.hidden:
            theirs, mine = mapped_layers(text, other.num_layers, own.num_layers)
            self.projected.append((_output(own, mine), _output(other, theirs)))
        for text in losses.mlp_input:
            theirs, mine = mapped_layers(text, other.num_layers, own.num_layers)
            self.projected.append((_mlp_input(own, mine), _mlp_input(other, theirs)))
        self.related: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        for text in losses.attention:
            theirs, mine = mapped_layers(text, other.num_layers, own.num_layers)
            self.related.append((_qkv(own, mine), _qkv(other, theirs)))
        self.widths = _qkv_widths(own), _qkv_widths(other)
        heads = gcd(own.num_heads, other.num_heads)
        kv_heads = gcd(own.num_kv_heads, other.num_kv_heads)
        self.relation_heads = heads, kv_heads, kv_heads
        self.projection = None
        if self.projected:
            of_student = InMemory(student) if weights is None else weights
            start = _start(of_student, teacher, own, other, channels)
            device = next(student.parameters()).device
            self.projection = nn.Parameter(start if device.type == "meta" else start.to(device))

    @property
    def student_modules(self) -> set[str]:
        """The modules of the student whose outputs `forward` reads."""
        return {mine for mine, _ in self.projected} | {name for mine, _ in self.related for name in mine}

    @property
    def teacher_modules(self) -> set[str]:
        """The modules of the teacher whose outputs `forward` reads."""
        return {theirs for _, theirs in self.projected} | {name for _, theirs in self.related for name in theirs}

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """L_is, float32 [rows]. student, teacher: {module name: output [rows, seq_length, …]} of the modules listed above."""
        losses = [self._distance(student[mine], teacher[theirs]) for mine, theirs in self.projected]
        for mine, theirs in self.related:
            of_student = torch.cat([student[name] for name in mine], dim=-1).split(self.widths[0], dim=-1)
            of_teacher = torch.cat([teacher[name] for name in theirs], dim=-1).split(self.widths[1], dim=-1)
            losses += map(relation_loss, of_student, of_teacher, self.relation_heads)
        return torch.stack(losses).sum(dim=0)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        assert self.projection is not None
        mapped = functional.linear(student.float(), self.projection)
        teacher = teacher.float()
        if self.how == "mse":
            return (mapped - teacher).square().mean(dim=(1, 2))
        return (1 - functional.cosine_similarity(mapped, teacher, dim=-1)).mean(dim=1)


def dynamic_alpha(logit_loss: Tensor, intermediate: Tensor) -> Tensor:
    """α = L_logits / L_is of each row, [rows], without a gradient; 0 if L_is is below NEGLIGIBLE."""
    value = intermediate.detach()
    return torch.where(value > NEGLIGIBLE, logit_loss / value.clamp_min(NEGLIGIBLE), 0.0)


def _embedding(model: Architecture) -> str:
    return model.table.embedding.removesuffix(".weight")


def _output(model: Architecture, layer: int) -> str:
    """The norm that reads a layer's output."""
    last = layer == model.num_layers - 1
    return model.table.final_norm if last else f"{model.table.layers}.{layer + 1}.{model.table.norms[0]}"


def _mlp_input(model: Architecture, layer: int) -> str:
    return f"{model.table.layers}.{layer}.{model.table.norms[-1]}"


def _qkv(model: Architecture, layer: int) -> tuple[str, ...]:
    return tuple(f"{model.table.layers}.{layer}.{name}" for name in model.table.qkv)


def _qkv_widths(model: Architecture) -> list[int]:
    return [heads * model.head_dim for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)]


def _start(
    student: Weights, teacher: nn.Module, own: Architecture, other: Architecture, channels: Tensor | None
) -> Tensor:
    width = own.hidden_size
    teacher_width = other.hidden_size
    if channels is not None:
        if channels.shape != (width,) or int(channels.min()) < 0 or int(channels.max()) >= teacher_width:
            raise InputError(
                f"channels: {list(channels.shape)}, {int(channels.min())} to {int(channels.max())}",
                f"give the {width} of the teacher's {teacher_width} channels that the student kept",
            )
        return torch.eye(teacher_width).index_select(1, channels.cpu())
    if width == teacher_width:
        return torch.eye(width)
    outputs = teacher.get_parameter(other.table.embedding).detach().float()
    inputs = student.rows(own.table.embedding, 0, own.vocab_size).to(outputs.device).float()
    if len(inputs) != len(outputs):
        raise InputError(
            f"the teacher's vocabulary has {len(outputs)} tokens, the student's {len(inputs)}",
            "distil from a teacher with the same tokenizer and head",
        )
    square = inputs.T @ inputs
    square.diagonal().add_(1e-6 * square.diagonal().mean())
    return torch.linalg.solve(square, inputs.T @ outputs).T.contiguous()

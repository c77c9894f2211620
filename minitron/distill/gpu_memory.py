"""The GPU memory that a training needs, from architectures and settings alone: bytes of each item."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from minitron.architecture import Architecture
from minitron.arguments import check_type
from minitron.distill.activations import (
    FLOAT,
    backward_per_token,
    final_norm,
    forward_per_token,
    fp8_per_token,
    kept_per_token,
)
from minitron.distill.config import ADAMW_8BIT, ADAMW_OFFLOAD, DistillConfig
from minitron.distill.losses import chunked, fused
from minitron.distill.low_bit import MOMENT_BYTES
from minitron.distill.sharding import STATE_BYTES, parts_of
from minitron.logits import most_tokens

CONTEXT = 1_500_000_000
"""Bytes of the CUDA context, the libraries' workspaces and NCCL."""
COMPARED_BYTES = 16
"""Bytes per compared value of a teacher's hidden states: the value, the student's, float32 copies and gradients."""
TeacherKept = Literal["head", "whole", "sharded"]
"""The part of the teacher on a GPU: its head (with stored hidden states), all of it, or a shard of its layers."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of each item on one GPU at the peak of a training step, and the totals at the start and at the end."""

    weights: int = 0
    """The student's weights, in the dtype that it computes in."""
    masters: int = 0
    """float32 master weights."""
    moments: int = 0
    """AdamW's two moments, in float32 or 8 bits; of the latter also the largest tensor's in float32, while they are updated."""
    gradients: int = 0
    """The float32 sums, and the gradients of one micro-batch."""
    activations: int = 0
    logits: int = 0
    """The loss head: chunks of logits of both models, their gradient, and that of the head."""
    teacher: int = 0
    """Its weights, or its head and the hidden states of a micro-batch."""
    source: int = 0
    """The model that the student was pruned from, if it remains for the next student."""
    communication: int = 0
    """Gathered layers, and gradients before they are reduced to shards."""
    context: int = CONTEXT
    start: int = 0
    """Total while the models are loaded."""
    end: int = 0
    """Total while the trained model is written, without what only steps need; a sharded one is gathered one tensor at a time,
    rounded to the dtype that it computes in."""

    @property
    def parts(self) -> dict[str, int]:
        """The items of a step that are not 0, the largest first."""
        sizes = {name: size for name in _ITEMS if (size := getattr(self, name))}
        return dict(sorted(sizes.items(), key=lambda part: -part[1]))

    @property
    def step(self) -> int:
        return sum(getattr(self, name) for name in _ITEMS)

    @property
    def peak(self) -> int:
        return max(self.step, self.start, self.end)

    def __str__(self) -> str:
        """For example "38.1 GB: gradients 18.0, weights 9.0, ..."; the items in GB."""
        return f"{self.peak / 1e9:.1f} GB: " + ", ".join(f"{n} {size / 1e9:.1f}" for n, size in self.parts.items())


_ITEMS = tuple(field.name for field in fields(GpuMemory) if field.name not in ("start", "end"))


def gpu_memory(
    student: Architecture,
    config: DistillConfig,
    seq_length: int,
    *,
    teacher: Architecture | None = None,
    teacher_kept: TeacherKept = "head",
    source: Architecture | None = None,
    source_kept: bool = False,
    processes: int = 1,
    node_processes: int = 0,
    gpu_bytes: int = 0,
    value_bytes: int = 2,
    trained: float = 1.0,
    compared: int = 0,
    triton: bool = True,
) -> GpuMemory:
    """Bytes of each of `processes` GPUs that train `student` on rows of `seq_length` tokens.

    config: its batch, micro-batch, shard, activation_checkpointing, optimizer and fp8 count. teacher: what the student is
    compared with, None for the next token alone; `teacher_kept` says what of it is on the GPU. source: the model that the
    student is cut from here, at the start; with `source_kept` it stays. A sharded student is cut elsewhere, one tensor at a
    time.
    node_processes, gpu_bytes: processes on each node and memory of a GPU, which decide where copies are split inside nodes
    (see `parts_of`); by default all processes split one. value_bytes: of the dtype that models compute in.
    trained: share of the parameters that is trained.
    triton: the loss on logits is the kernel's, which bfloat16 alone has.
    compared: outputs within layers that losses compare with the teacher's, by a rough figure.

    Compiled layers take less than what is estimated; FP8 products are counted as if they were not compiled.
    """
    check_type("student", student, Architecture)
    check_type("config", config, DistillConfig, "a DistillConfig")
    parts = parts_of(STATE_BYTES * student.num_parameters, processes, node_processes, gpu_bytes)
    training = _Training(student, config, seq_length, processes, parts, value_bytes, trained)
    tokens = training.tokens
    state = training.state
    kept = 0  # of the teacher, from the first step to the last
    if teacher is not None:
        inside = value_bytes * teacher.num_layers * layer_parameters(teacher)
        parts = parts_of(inside, processes, node_processes, gpu_bytes)
        kept = _teacher(teacher, teacher_kept, parts, value_bytes)
        states = tokens * (teacher.hidden_size * value_bytes + (FLOAT if teacher_kept == "head" else 0))
        state = replace(state, teacher=kept + states)
    cutting = 0
    if source is not None and not training.split:
        size = source.num_parameters * value_bytes
        cutting = size + student.num_parameters * value_bytes + state.teacher + CONTEXT
        state = replace(state, source=size if source_kept else 0)
    kept_sums = training.micro_batches > 1 or config.cuda_graphs  # graphs add to sums that stay where they are
    state = replace(state, gradients=training.sums if kept_sums else 0)
    in_teacher = state
    if teacher is not None and teacher_kept != "head":
        rounded = 0 if config.fp8 == "none" else fp8_per_token(teacher)
        in_teacher = replace(
            state,
            activations=tokens * (forward_per_token(teacher, value_bytes) + rounded),
            communication=2 * value_bytes * layer_parameters(teacher) if teacher_kept == "sharded" else 0,
        )
    in_loss = replace(
        state,
        activations=training.kept
        + tokens * final_norm(student, value_bytes)
        + tokens * compared * COMPARED_BYTES * (teacher.hidden_size if teacher else 0),
        logits=_loss_head(student, teacher, tokens, value_bytes, triton and value_bytes == 2),
        communication=training.gathered,
    )
    in_backward = replace(
        in_loss,
        logits=0,
        activations=training.kept + training.in_layer,
        communication=training.gathered + training.reduced,
    )
    at_the_end = replace(
        state,
        moments=state.moments + training.updated_moments,
        gradients=training.sums + (0 if training.split else value_bytes * training.embedding),
        communication=training.gathered + training.reduced_last,
    )
    step = max(in_teacher, in_loss, in_backward, at_the_end, key=lambda memory: memory.step)
    start = max(replace(state, gradients=0).step, cutting)
    written = replace(state, masters=0, moments=0, gradients=0, teacher=kept)
    if training.split:
        written = replace(written, masters=state.masters, communication=value_bytes * student.largest_tensor)
    return replace(step, start=start, end=written.step)


@dataclass(frozen=True)
class _Training:
    student: Architecture
    config: DistillConfig
    seq_length: int
    processes: int
    parts: int
    value_bytes: int
    trained: float

    @property
    def split(self) -> bool:
        return self.config.shard and self.processes > 1

    @property
    def state(self) -> GpuMemory:
        """What remains in memory from the first step to the last."""
        parameters = self.student.num_parameters
        mastered = 0 if self.config.optimizer == ADAMW_OFFLOAD else int(self.trained * FLOAT * parameters)
        if self.split:  # sharded parameters are their own masters, trained or not
            return GpuMemory(masters=FLOAT * parameters // self.parts, moments=2 * mastered // self.parts)
        moments = 2 * mastered
        if self.config.optimizer == ADAMW_8BIT:
            moments = int(moments * MOMENT_BYTES / FLOAT)
        return GpuMemory(weights=self.value_bytes * parameters, masters=mastered, moments=moments)

    @property
    def updated_moments(self) -> int:
        """With moments of 8 bits, those of one parameter in float32: what torchao's compiled step allocates."""
        return 2 * FLOAT * self.student.largest_tensor if self.config.optimizer == ADAMW_8BIT else 0

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return min(self.config.micro_batch_rows, self._own_rows)

    @property
    def micro_batches(self) -> int:
        return -(-self._own_rows // self.rows)

    @property
    def _own_rows(self) -> int:
        return -(-self.config.batch_rows // self.processes)

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_length

    @property
    def sums(self) -> int:
        """Bytes of the summed gradients of all micro-batches."""
        return int(self.trained * FLOAT * self.student.num_parameters) // (self.parts if self.split else 1)

    @property
    def kept(self) -> int:
        """Activations of all layers at the end of the forward pass."""
        layer = kept_per_token(self.student, self.value_bytes, self.config.activation_checkpointing)
        return self.tokens * self.student.num_layers * layer

    @property
    def in_layer(self) -> int:
        """What the backward pass through one layer adds, recomputed activations included."""
        how = self.config.activation_checkpointing
        stream = self.student.hidden_size * self.value_bytes
        again = 0
        if how != "none":
            all_of_it = kept_per_token(self.student, self.value_bytes, "none")
            again = all_of_it - kept_per_token(self.student, self.value_bytes, how) + stream
        rounded = 0 if self.config.fp8 == "none" else fp8_per_token(self.student)
        return self.tokens * (again + backward_per_token(self.student, self.value_bytes) + rounded)

    @property
    def embedding(self) -> int:
        """Number of values of the embedding, and of the head."""
        return self.student.vocab_size * self.student.hidden_size

    @property
    def gathered(self) -> int:
        """Gathered weights of a sharded student: the head, the running layer and the next one."""
        if not self.split:
            return 0
        return self.value_bytes * (self.embedding + 2 * layer_parameters(self.student))

    @property
    def reduced(self) -> int:
        """Gradients of the head, and of the previous layer in float32, until they are reduced to shards."""
        if not self.split:
            return 0
        return self.value_bytes * self.embedding + FLOAT * layer_parameters(self.student)

    @property
    def reduced_last(self) -> int:
        """Gradients of the embedding and the head, one of them in float32."""
        if not self.split:
            return 0
        return (2 * self.value_bytes + FLOAT) * self.embedding


def _teacher(teacher: Architecture, kept: TeacherKept, parts: int, value_bytes: int) -> int:
    """Bytes of the teacher's weights."""
    if kept == "head":
        return teacher.vocab_size * teacher.hidden_size * value_bytes
    if kept == "whole" or parts == 1:
        return teacher.num_parameters * value_bytes
    layer = layer_parameters(teacher)
    inside = teacher.num_layers * layer
    return value_bytes * (teacher.num_parameters - inside + inside // parts)


def layer_parameters(architecture: Architecture) -> int:
    """Number of parameters of one layer."""
    deeper = replace(architecture, num_layers=architecture.num_layers + 1)
    return deeper.num_parameters - architecture.num_parameters


def _loss_head(
    student: Architecture, teacher: Architecture | None, tokens: int, value_bytes: int, fused_loss: bool
) -> int:
    """Peak of the loss on logits, including the gradients that it returns."""
    vocabulary = student.vocab_size
    head = vocabulary * student.hidden_size
    models = 2 if teacher else 1
    hidden = tokens * student.hidden_size * value_bytes
    if fused_loss:
        chunk = min(tokens, most_tokens(vocabulary, "cuda", fused.CHUNK_TOKENS))
        part = fused.gradient_tokens(tokens, vocabulary)
        spaces = models * FLOAT * chunk * vocabulary + value_bytes * min(part, tokens) * vocabulary
        if part >= tokens:
            return hidden + value_bytes * head + spaces
        return hidden + max(FLOAT * head + spaces, (FLOAT + value_bytes) * head)
    chunk = min(tokens, most_tokens(vocabulary, "cuda", chunked.CHUNK_TOKENS["cuda"]))
    spaces = max(models * FLOAT, FLOAT + (0 if value_bytes == FLOAT else value_bytes)) * chunk * vocabulary
    product = value_bytes * head  # of a chunk, before it is added
    return hidden + FLOAT * head + max(spaces + product, spaces + value_bytes * head)

"""Estimate of the main memory that a process needs, from shapes and settings alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from minitron.architecture import Architecture
from minitron.distill.activations import FLOAT, backward_per_token, final_norm, kept_per_token
from minitron.distill.config import ADAMW_8BIT, ADAMW_OFFLOAD, DistillConfig
from minitron.distill.losses.chunked import CHUNK_TOKENS as LOSS_TOKENS
from minitron.distill.low_bit import MOMENT_BYTES
from minitron.distill.offload import buffer_sizes
from minitron.distill.teacher.shards import READ_AHEAD_BYTES
from minitron.distill.teacher.stored import stored_bytes
from minitron.logits import CHUNK_TOKENS, most_tokens

LIBRARIES = 600_000_000
"""Bytes of a process that has imported torch, transformers and Ray, without any model."""
CONVERSION_BYTES = 3
"""Bytes per parameter of a model that is converted, besides the model in its new dtype: what is read of it and copies. Measured
by `python -m benchmarks.conversion_memory`."""
FRAGMENTATION = 1.6
"""Memory that a process takes for activations, as a multiple of their size: the C library keeps what earlier micro-batches
freed, and later ones fit into a part of it. Measured by `python -m benchmarks.training_memory`."""


@dataclass(frozen=True)
class MainMemory:
    """Peak main memory of one process, bytes, by use."""

    libraries: int = LIBRARIES
    weights: int = 0
    """Weights of the models that compute, in their dtype."""
    teacher: int = 0
    """Weights of the teacher, or of its head, next to the model in training."""
    source: int = 0
    """What is read of a model that is converted, and copies of it."""
    optimizer: int = 0
    """float32 master weights and AdamW's two moments; with "adamw-offload" also its buffers for gradients and new weights."""
    gradients: int = 0
    activations: int = 0
    logits: int = 0
    """Logits of one chunk of tokens of each model, and the gradient of the head."""
    checkpoint: int = 0
    """The copy of the training state that is written in the background."""
    rows: int = 0
    """Stored rows of the teacher that are read ahead, or that are being written."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def weight_bytes(architecture: Architecture, value_bytes: int) -> int:
    """Bytes of a model's weights with `value_bytes` bytes per parameter."""
    return architecture.num_parameters * value_bytes


def conversion_memory(architecture: Architecture, value_bytes: int) -> MainMemory:
    """Memory for reading a model from a GGUF file or safetensors and writing it with `value_bytes` bytes per weight."""
    return MainMemory(
        weights=weight_bytes(architecture, value_bytes), source=CONVERSION_BYTES * architecture.num_parameters
    )


def forward_memory(
    models: list[Architecture], value_bytes: int, tokens: int, *, logits: int = 1, streams: int = 2
) -> MainMemory:
    """Memory for the forward pass of one of several loaded models on batches of `tokens` tokens.

    value_bytes: bytes per weight and activation. logits: number of models whose logits exist at the same time. streams: number
    of hidden states [tokens, hidden_size] that are kept.
    """
    widest = max(models, key=lambda model: model.num_parameters)
    return MainMemory(
        weights=sum(weight_bytes(model, value_bytes) for model in models),
        activations=tokens * (_layer_bytes(widest, value_bytes) + streams * widest.hidden_size * value_bytes),
        logits=logits * _chunk_bytes(widest, CHUNK_TOKENS),
    )


def training_memory(
    student: Architecture,
    config: DistillConfig,
    seq_length: int,
    value_bytes: int,
    *,
    teacher: Architecture | None = None,
    whole_teacher: bool = False,
    measured: bool = False,
    workers: int = 1,
) -> MainMemory:
    """Memory of one of `workers` processes that train `student` on CPUs; all parameters are trained.

    seq_length: tokens per row. value_bytes: bytes per weight and activation. teacher: the teacher's architecture, if there is
    one; only its head is kept in memory, or with `whole_teacher` the whole model. measured: whether held-out rows are scored
    during the training.
    """
    parameters = student.num_parameters
    shards = workers if config.shard else 1
    inner = parameters - student.vocab_size * student.hidden_size
    weights = parameters * value_bytes
    # the sum over micro-batches, and the gradient of one micro-batch
    gradients = FLOAT * parameters // shards + value_bytes * parameters
    head = student.vocab_size * student.hidden_size
    tokens = min(config.micro_batch_rows, config.batch_rows) * seq_length
    chunks = (2 if teacher else 1) * _chunk_bytes(student, CHUNK_TOKENS if measured else LOSS_TOKENS["cpu"])
    teacher_bytes = rows = 0
    if teacher:
        row = stored_bytes(1, seq_length, teacher.hidden_size, value_bytes)
        rows = min(READ_AHEAD_BYTES, 2 * row * -(-config.batch_rows // workers))  # of two steps
        kept = teacher.num_parameters if whole_teacher else teacher.vocab_size * teacher.hidden_size
        teacher_bytes = kept * value_bytes
    moment = MOMENT_BYTES if config.optimizer == ADAMW_8BIT else FLOAT
    copy = int((FLOAT + 2 * moment) * parameters) // workers if config.checkpoint_every else 0
    staged = 0
    if config.optimizer == ADAMW_OFFLOAD:
        staged = sum(buffer_sizes(parameters, value_bytes))
    if shards > 1:
        weights += FLOAT * head + value_bytes * inner // student.num_layers  # gathered: the head and one layer
    return MainMemory(
        weights=weights,
        teacher=teacher_bytes,
        optimizer=int((FLOAT + 2 * moment) * parameters) // shards + staged,
        gradients=gradients,
        activations=_training_activations(student, tokens, value_bytes, config.activation_checkpointing),
        logits=chunks + head * (FLOAT + value_bytes),
        checkpoint=copy,
        rows=rows,
    )


def _chunk_bytes(architecture: Architecture, most: int) -> int:
    return FLOAT * architecture.vocab_size * most_tokens(architecture.vocab_size, "cpu", most)


def _layer_bytes(architecture: Architecture, value_bytes: int) -> int:
    """Largest bytes of activations of a layer per token, without gradients: two norms with their float32 copies, queries,
    keys and values before and after rotary embedding and repetition over KV groups, attention's output, and four results in
    the MLP."""
    width = architecture.intermediate_size * max(1, architecture.experts_per_token)
    heads = architecture.num_heads * architecture.head_dim
    return architecture.hidden_size * (2 * 2 * FLOAT + 4 * value_bytes) + value_bytes * (5 * heads + 4 * width)


def _training_activations(architecture: Architecture, tokens: int, value_bytes: int, how: str) -> int:
    """Bytes of activations; `how`: the activation checkpointing, as in `DistillConfig`."""
    kept = architecture.num_layers * kept_per_token(architecture, value_bytes, how) + final_norm(
        architecture, value_bytes
    )
    again = 0 if how == "none" else kept_per_token(architecture, value_bytes, "none")
    return tokens * (int(FRAGMENTATION * kept) + again + backward_per_token(architecture, value_bytes))

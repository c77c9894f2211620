"""Estimate of the main memory that a process needs, from shapes and settings alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from minitron.architecture import Architecture
from minitron.distill.config import DistillConfig
from minitron.distill.losses.chunked import CHUNK_TOKENS as LOSS_TOKENS
from minitron.logits import CHUNK_TOKENS, most_tokens

LIBRARIES = 600_000_000
"""Of a process with Python, torch, transformers and Ray, before it loads anything."""
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class MainMemory:
    """Bytes of one process at its peak, by what takes them."""

    libraries: int = LIBRARIES
    weights: int = 0
    """Of the models that compute, in their own dtype."""
    teacher: int = 0
    """Of a teacher or its head beside the model that is trained."""
    optimizer: int = 0
    """float32 master weights and AdamW's two moments."""
    gradients: int = 0
    activations: int = 0
    logits: int = 0
    """Chunks of logits of both models, and the gradient of the head."""
    checkpoint: int = 0
    """The copy that is written while training goes on."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def weight_bytes(architecture: Architecture, value_bytes: int) -> int:
    return architecture.num_parameters * value_bytes


def forward_memory(
    models: list[Architecture], value_bytes: int, tokens: int, *, logits: int = 1, streams: int = 2
) -> MainMemory:
    """Running one of several loaded models forward on batches of `tokens` tokens, with `logits` models' logits beside each
    other, keeping `streams` hidden states of a batch."""
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
    """One of `workers` processes that train `student` on a CPU, with models of `value_bytes` a value.

    teacher: what it is compared with; of its weights the head stays, or all with `whole_teacher`. measured: held-out rows
    are measured in between. Gradients are those of all parameters.
    """
    parameters, shards = student.num_parameters, workers if config.shard else 1
    inner = parameters - student.vocab_size * student.hidden_size
    weights = parameters * value_bytes
    # the sums over micro-batches, and what one micro-batch adds
    gradients = FLOAT * parameters // shards + value_bytes * parameters
    head = student.vocab_size * student.hidden_size
    tokens = min(config.micro_batch_rows, config.batch_rows) * seq_length
    chunks = (2 if teacher else 1) * _chunk_bytes(student, CHUNK_TOKENS if measured else LOSS_TOKENS["cpu"])
    of_teacher = 0
    if teacher:
        kept = teacher.num_parameters if whole_teacher else teacher.vocab_size * teacher.hidden_size
        of_teacher = kept * value_bytes
    copy = 3 * FLOAT * parameters // workers if config.checkpoint_every else 0
    if shards > 1:
        weights += FLOAT * head + value_bytes * inner // student.num_layers  # what is gathered
    steady = MainMemory(
        weights=weights,
        teacher=of_teacher,
        optimizer=3 * FLOAT * parameters // shards,
        gradients=gradients,
        activations=_kept_bytes(student, tokens, value_bytes, config.activation_checkpointing),
        logits=chunks + head * (FLOAT + value_bytes),
        checkpoint=copy,
    )
    if teacher is None:
        return steady
    loading = MainMemory(weights=weight_bytes(student, value_bytes), teacher=weight_bytes(teacher, value_bytes))
    return max(steady, loading, key=lambda memory: memory.total)


def _chunk_bytes(architecture: Architecture, most: int) -> int:
    return FLOAT * architecture.vocab_size * most_tokens(architecture.vocab_size, "cpu", most)


def _layer_bytes(architecture: Architecture, value_bytes: int) -> int:
    """What a layer keeps of a token for the backward pass: two norms with their float32 copies, queries, keys and values
    before and after rotation and repetition, attention's output, and four results in the MLP."""
    width = architecture.intermediate_size * max(1, architecture.experts_per_token)
    heads = architecture.num_heads * architecture.head_dim
    return architecture.hidden_size * (2 * 2 * FLOAT + 4 * value_bytes) + value_bytes * (5 * heads + 4 * width)


def _kept_bytes(architecture: Architecture, tokens: int, value_bytes: int, how: str) -> int:
    """Of all layers, with activation checkpointing as `how` says."""
    layer, stream = _layer_bytes(architecture, value_bytes), architecture.hidden_size * value_bytes
    if how == "none":
        return tokens * architecture.num_layers * layer
    width = architecture.intermediate_size * max(1, architecture.experts_per_token)
    heads = architecture.num_heads * architecture.head_dim
    products = value_bytes * (4 * heads + 2 * width) + 2 * stream
    kept = stream + (products if how == "selective" else 0)
    return tokens * (architecture.num_layers * kept + layer)

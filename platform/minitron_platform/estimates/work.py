"""The work of a stage in parts, each of which the workers of a cluster share in one of four ways."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a stage's work. Sizes are in bytes."""

    flops: float = 0
    """FLOPs of all workers together."""
    tokens: int = 0
    """Tokens that a model reads."""
    reads_per_node: int = 0
    """Models, which every node reads from the storage once."""
    reads: int = 0
    """All else that is read from the storage, by all workers together."""
    writes: int = 0
    """What is written to the storage, by all workers together."""
    requests: int = 0
    """Requests to the storage if it is an object store."""
    cpu_seconds: float = 0
    """Time on one CPU, of all workers together, for work that needs no GPU."""


@dataclass(frozen=True, kw_only=True)
class Alone(Part):
    """One worker does it, on one CPU what needs no GPU, and the others wait."""


@dataclass(frozen=True, kw_only=True)
class Split(Part):
    """Independent items, such as rows or documents, that all workers share."""

    items: int


@dataclass(frozen=True, kw_only=True)
class DataParallel(Part):
    """A training: in every step the workers share the rows of the batch and exchange gradients, and weights if they are
    sharded."""

    steps: int
    batch_rows: int
    inside_bytes: float = 0
    """That a GPU exchanges in a step with the other GPUs of its node."""
    between_bytes: float = 0
    """That a GPU exchanges in a step with other nodes."""


@dataclass(frozen=True, kw_only=True)
class Trials(Part):
    """Trials of the search, as many at once as there is room for; the part ends with the last of them.

    `flops`, `reads` and `writes` are those of all trials.
    """

    shares: tuple[float, ...]
    """Every trial's share of the work, in the order in which they start; the sum is 1."""
    workers: int
    """Workers of a trial."""
    gpus: float
    """GPUs of each of these workers."""
    balance: float = 1.0
    """Share of the time that the workers of a trial compute, because the rows of a step may not divide by their number."""

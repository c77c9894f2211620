"""What is known of a run before it starts, and what a stage says of itself from that."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.architecture import Architecture
from minitron.distill import Losses
from minitron_platform.estimates.memory import ProcessMemory
from minitron_platform.estimates.teacher import TeacherCost
from minitron_platform.recipes.candidates import MemberCandidates
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.schema import Member, Recipe

DOCUMENT_TOKENS = 90  # of a benchmark, roughly
MASTER_BYTES = 12  # per parameter of a checkpoint: float32 weights and two moments


@dataclass(frozen=True)
class Outlook:
    """What every stage can estimate from."""

    recipe: Recipe
    resources: ResolvedResources
    teacher: Architecture
    family: dict[str, MemberCandidates]
    """By model of the family."""
    losses: dict[str, Losses]
    """Of each model's distillation."""
    targets: TeacherCost
    """Of the recipe's `targets.mode`."""
    value_bytes: int
    """Bytes of a weight in the dtype that models compute in."""
    concurrent_trials: int
    """Trials that have room at once."""

    def shapes(self, member: Member) -> list[Architecture]:
        """The candidates, the largest first."""
        return self.family[member.model].architectures

    def largest(self, member: Member) -> Architecture:
        return self.shapes(member)[0]

    def base(self, member: Member) -> Architecture:
        """The largest model that `member` may be cut from."""
        return self.family[member.model].space.base


@dataclass(frozen=True)
class Estimate:
    """What a stage will take."""

    what: str
    """The work in a few words."""
    flops: float = 0
    bytes: int = 0
    """Of the storage, at the most at once."""
    start_up_seconds: float = 5
    """Loading and starting, beside what `flops` take."""
    memory: ProcessMemory | None = None
    """Main memory; None where it is not worth stating or models run on GPUs."""


def head_flops(architecture: Architecture) -> int:
    """FLOPs of the output head for a token."""
    return 2 * architecture.vocab_size * architecture.hidden_size


def training_flops(outlook: Outlook, student: Architecture, tokens: int) -> float:
    """Forward and backward of the student, the teacher's head, and the loss's second pass over the student's."""
    seq = outlook.recipe.data.seq_length
    return tokens * (3 * student.flops_per_token(seq) + head_flops(outlook.teacher))

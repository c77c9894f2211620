"""The facts about a run that stages base their estimates on before it starts, and the form of an estimate."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.architecture import Architecture
from minitron.distill import Losses
from minitron_platform.estimates.gpu import GpuTraining
from minitron_platform.estimates.memory import ProcessMemory
from minitron_platform.estimates.node_memory import NodeWork
from minitron_platform.estimates.requests import STAGE
from minitron_platform.estimates.teacher import TeacherCost, teacher_cost
from minitron_platform.estimates.work import Part, Split
from minitron_platform.recipes.build import distillation_losses
from minitron_platform.recipes.candidates import MemberCandidates
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.schema import Member, Recipe

DOCUMENT_TOKENS = 90  # rough average length of a benchmark request
MASTER_BYTES = 12  # per parameter in a training checkpoint: float32 weights and AdamW's two moments


@dataclass(frozen=True)
class Outlook:
    """All that is known of a run before it starts."""

    recipe: Recipe
    resources: ResolvedResources
    teacher: Architecture
    family: dict[str, MemberCandidates]
    """Candidates by model of the family."""
    losses: dict[str, Losses]
    """Losses of the full distillation, by model of the family."""
    teacher_cost: TeacherCost
    """For the recipe's `targets.mode`."""
    value_bytes: int
    """Bytes of a weight in the compute dtype."""
    concurrent_trials: int
    """Number of trials that can run at the same time."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        teacher: Architecture,
        resources: ResolvedResources,
        *,
        family: dict[str, MemberCandidates],
        value_bytes: int,
        concurrent_trials: int,
    ) -> Outlook:
        """With the losses and the teacher's cost that follow from these."""
        losses = {
            model: distillation_losses(recipe, allowed.architectures[0], teacher)[0]
            for model, allowed in family.items()
        }
        cost = teacher_cost(recipe, teacher, losses, value_bytes, recipe.targets.mode)
        return cls(recipe, resources, teacher, family, losses, cost, value_bytes, concurrent_trials)

    def shapes(self, member: Member) -> list[Architecture]:
        """The candidates for `member`, the largest first."""
        return self.family[member.model].architectures

    def largest(self, member: Member) -> Architecture:
        """The largest candidate for `member`."""
        return self.shapes(member)[0]

    def base(self, member: Member) -> Architecture:
        """The largest model that `member` may be pruned from."""
        return self.family[member.model].space.base


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a stage."""

    what: str
    """The work in a few words."""
    bytes: int = 0
    """Peak use of the storage."""
    start_up_seconds: float = 5
    """Time to load and start, in addition to the time that `flops` take."""
    memory: ProcessMemory | None = None
    """Main memory on CPUs; None if it is negligible."""
    gpu: GpuTraining | None = None
    """A training on GPUs."""
    node: NodeWork | None = None
    """What it does on the nodes, whose main memory that takes; None on CPUs, and if it is negligible."""
    parts: tuple[Part, ...] = ()
    """The work, and how the workers of a cluster share it; empty if it is negligible."""

    @property
    def flops(self) -> float:
        """FLOPs of all models, on one machine as on a cluster."""
        return sum(part.flops for part in self.parts)

    def cpu_seconds(self, cpus: int) -> float:
        """Time for work without models on this many CPUs."""
        return sum(part.cpu_seconds / (cpus if isinstance(part, Split) else 1) for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens that models read."""
        return sum(part.tokens for part in self.parts)

    @property
    def requests(self) -> int:
        """Requests to the storage if it is an object store, without heartbeats."""
        return STAGE + sum(part.requests for part in self.parts)


def head_flops(architecture: Architecture) -> int:
    """FLOPs of the language-model head per token."""
    return 2 * architecture.vocab_size * architecture.hidden_size

"""What is known of a run of a recipe: its stages' outputs so far, and the model of the family that is being made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from minitron import storage
from minitron_platform.locations import Locations
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.stages.stage import Stage, StageOutput, StudentOutput

T = TypeVar("T", bound=StageOutput)


@dataclass
class RunState:
    """Outputs of the finished stages, by stage and, where each model of the family has its own, by model."""

    recipe: Recipe
    locations: Locations
    run_key: str
    current: Member | None = None
    """The model whose stages are being done; None for a stage that the family shares."""
    shared: dict[str, StageOutput] = field(default_factory=dict)
    """By the stage's name."""
    family: dict[str, dict[str, StageOutput]] = field(default_factory=dict)
    """By the model's name, then the stage's."""

    @property
    def member(self) -> Member:
        """The model of the family whose stages are being done."""
        assert self.current is not None
        return self.current

    def output(self, stage: type[Stage[T]], member: Member | None = None) -> T:
        """A finished stage's output; of `member`, by default the current model, if each model has its own."""
        outputs = self.family[(member or self.member).model] if stage.per_model else self.shared
        output = outputs[stage.name]
        assert isinstance(output, stage.output_type)
        return output  # type: ignore[return-value]

    def student(self, member: Member) -> StudentOutput:
        """A finished model of the family, as the last of its stages left it."""
        students = [output for output in self.family[member.model].values() if isinstance(output, StudentOutput)]
        return students[-1]

    def is_finished(self, stage: Stage[Any] | type[Stage[Any]], member: Member | None = None) -> bool:
        outputs = self.family.get(member.model, {}) if member else self.shared
        return stage.name in outputs

    def finish(self, stage: Stage[Any], output: StageOutput) -> None:
        """Take in a finished stage's output."""
        outputs = self.family.setdefault(self.member.model, {}) if stage.per_model else self.shared
        outputs[stage.name] = output

    def fingerprint(self, stage: Stage[Any]) -> str:
        """Content address of a stage's output; needs the outputs of the stages that it reads."""
        return storage.fingerprint({"stage": stage.name, "version": stage.version, "inputs": stage.inputs(self)})

    def title(self, name: str) -> str:
        """What a stage or trial is called where several models have one of that name."""
        return f"{name} {self.current.model}" if self.current and len(self.recipe.family) > 1 else name

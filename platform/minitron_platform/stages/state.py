"""The state of a run: the outputs of its finished stages, and the model of the family that is being made."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from minitron import storage
from minitron.data import source_identity as text_identity
from minitron.device import compute_dtype
from minitron.models import source_identity
from minitron_platform.locations import Locations
from minitron_platform.recipes.build import all_text_sources, separates_documents
from minitron_platform.recipes.keys import named_by_key
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.stages.stage import Stage, StageOutput, StudentOutput

T = TypeVar("T", bound=StageOutput)


@dataclass
class RunState:
    """A run of a recipe, as far as it is finished."""

    recipe: Recipe
    locations: Locations
    run_key: str
    auto_dtype: torch.dtype | None = None
    """Compute dtype for `teacher.dtype: auto` if models run elsewhere than on this machine; None for this machine's."""
    on_gpus: bool | None = None
    """Whether models run on GPUs of a cluster; None if they run on this machine's device."""
    current: Member | None = None
    """The model whose stages are running; None during a stage that the family shares."""
    shared: dict[str, StageOutput] = field(default_factory=dict)
    """Outputs of the stages that the family shares, by the stage's name."""
    family: dict[str, dict[str, StageOutput]] = field(default_factory=dict)
    """Outputs of the other stages, by the model's name, then the stage's."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that the finished stages took, by the fingerprint of their output."""

    # Names on the hub are resolved once, so that the commits that are read are those of the fingerprints, whatever is pushed
    # meanwhile.

    @cached_property
    def teacher_source(self) -> dict[str, Any]:
        """Identity of the teacher's source, see `minitron.models.source_identity`."""
        return source_identity(self.recipe.teacher.model, self.recipe.teacher.revision)

    @cached_property
    def texts(self) -> dict[str, dict[str, Any]]:
        """Identities of the texts by their recipe keys, see `minitron.data.source_identity`."""
        return {key: text_identity(source) for key, source in all_text_sources(self.recipe.data).items()}

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that all models of the run compute in."""
        if self.recipe.teacher.dtype == "auto" and self.auto_dtype is not None:
            return self.auto_dtype
        return compute_dtype(self.recipe.teacher.dtype)

    @property
    def separate_documents(self) -> bool:
        """Whether the documents of a row do not attend to each other."""
        return separates_documents(self.recipe, self.on_gpus)

    @property
    def member(self) -> Member:
        """The model of the family whose stages are running."""
        assert self.current is not None
        return self.current

    def output(self, stage: type[Stage[T]], member: Member | None = None) -> T:
        """Output of a finished stage; of a stage that runs once per model, the output for `member` (default: the current
        one)."""
        outputs = self.family[(member or self.member).model] if stage.per_model else self.shared
        output = outputs[stage.name]
        assert isinstance(output, stage.output_type)
        return output  # type: ignore[return-value]

    def student(self, member: Member) -> StudentOutput:
        """The finished model `member`, from the last stage that made or changed it."""
        students = [output for output in self.family[member.model].values() if isinstance(output, StudentOutput)]
        return students[-1]

    def is_finished(self, stage: Stage[Any] | type[Stage[Any]], member: Member | None = None) -> bool:
        """Whether a stage is finished: for `member`, or for the whole family if that is None."""
        outputs = self.family.get(member.model, {}) if member else self.shared
        return stage.name in outputs

    def finish(self, stage: Stage[Any], output: StageOutput) -> None:
        """Add the output of a finished stage."""
        outputs = self.family.setdefault(self.member.model, {}) if stage.per_model else self.shared
        outputs[stage.name] = output

    def fingerprint(self, stage: Stage[Any]) -> str:
        """Content address of a stage's output. The stages that it reads from must be finished."""
        with self.named_errors(stage):
            inputs = stage.inputs(self)
        return storage.fingerprint({"stage": stage.name, "version": stage.version, "inputs": inputs})

    def named_errors(self, stage: Stage[Any]) -> AbstractContextManager[None]:
        """A context in which an InputError of `stage` gets the recipe key that it belongs to."""
        return named_by_key(stage.recipe_key(self.recipe, self.current))

    def attention(self) -> dict[str, Any]:
        """The setting of attention that models' outputs on rows depend on, as inputs of a stage. Empty if the documents of
        a row attend to each other, as in storages of versions that had no such setting."""
        return {"documents": "separate"} if self.separate_documents else {}

    def record_key(self, part: str, member: Member | None) -> str:
        """Key of the record of a stage or trial: for `member`, or for the whole family if that is None."""
        prefix = f"{member.model}." if member and len(self.recipe.family) > 1 else ""
        return f"{self.run_key}.{prefix}{part}"

    def title(self, name: str) -> str:
        """The name of a stage or trial, followed by the current model if the family has several."""
        return f"{name} {self.current.model}" if self.current and len(self.recipe.family) > 1 else name

"""What `run` returns: the students of a family, their figures, and where the report is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import MODELS, Evaluate
from minitron_platform.stages.register import Register
from minitron_platform.stages.stage import Stage, StageOutput
from minitron_platform.stages.state import RunState

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T", bound=StageOutput)


@dataclass(frozen=True)
class Student:
    """A finished model of the family."""

    model: str
    """Its name in the recipe and in the registry."""
    version: str
    """In the registry."""
    path: str
    """A plain transformers checkpoint folder."""
    parameters: int
    kl: float
    """Held-out KL to the teacher, nats per token."""


@dataclass(frozen=True, repr=False)
class RunResult:
    """A run as far as it went: all of it, or up to the stage that `until` named."""

    state: RunState = field(repr=False)
    """The outputs of all stages, see `output`."""

    @property
    def run_key(self) -> str:
        """The run's name."""
        return self.state.run_key

    @property
    def students(self) -> tuple[Student, ...]:
        """The models of the family that are registered, in the recipe's order."""
        finished = [m for m in self.state.recipe.family if self.state.is_finished(Register, m)]
        return tuple(
            Student(
                model=member.model,
                version=self.state.output(Register, member).version,
                path=self.state.output(Distill, member).student,
                parameters=self.state.output(Distill, member).parameters,
                kl=self.state.output(Evaluate, member).table["distilled"].kl,
            )
            for member in finished
        )

    @property
    def is_complete(self) -> bool:
        """Whether every model of the family is registered."""
        return len(self.students) == len(self.state.recipe.family)

    @property
    def report(self) -> Path | None:
        """The run's report.html; None before the run is complete."""
        path = Path(self.state.locations.local_run(self.run_key)) / "report.html"
        return path if path.exists() else None

    @property
    def table(self) -> pd.DataFrame:
        """Every figure of the final table, as stored: a row per model before and after its distillation, the teacher first;
        KL and loss in nats per token, agreement and accuracies as shares of 1."""
        import pandas as pd

        rows: dict[str, dict[str, float]] = {}
        for member in self.state.recipe.family:
            if not self.state.is_finished(Evaluate, member):
                continue
            table = self.state.output(Evaluate, member).table
            for name in MODELS:
                figures = table[name]
                scores = {f"{task} {score.metric}": score.value for task, score in figures.tasks.items()}
                row = figures.numbers | scores
                rows.setdefault(name if name == "teacher" else f"{member.model} {name}", row)
        return pd.DataFrame.from_dict(rows, orient="index")

    def output(self, stage: type[Stage[T]], model: str | None = None) -> T:
        """What a stage handed on, for example `result.output(Search, "smollm2-90m").ranking`; `model` is by default the
        family's first."""
        members = {member.model: member for member in self.state.recipe.family}
        return self.state.output(stage, members[model] if model else self.state.recipe.family[0])

    def __repr__(self) -> str:
        students = ", ".join(
            f"{s.model} version {s.version}: {s.parameters:,} parameters, KL {s.kl:.3f}" for s in self.students
        )
        return f"RunResult({self.run_key}: {students or 'no student yet'})"

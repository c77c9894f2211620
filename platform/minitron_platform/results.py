"""The result of `run`: the students of a family, their metrics and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from minitron.errors import InputError
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
    version: str | None
    """Its version in the registry; None as long as MLflow has not taken it."""
    path: str
    """Folder of a plain transformers checkpoint."""
    parameters: int
    """Number of parameters."""
    kl: float
    """Held-out KL to the teacher, nats per token."""


@dataclass(frozen=True, repr=False)
class RunResult:
    """The result of a run that is complete, or that ended after the stage that `until` named."""

    state: RunState = field(repr=False)
    """The outputs of all finished stages; `output` reads them."""

    @property
    def run_key(self) -> str:
        """The run's name."""
        return self.state.run_key

    @property
    def students(self) -> tuple[Student, ...]:
        """The finished models of the family, in the recipe's order."""
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
        """Whether every model of the family is finished."""
        return len(self.students) == len(self.state.recipe.family)

    @property
    def report(self) -> Path | None:
        """Path of the run's report.html; None if the run is not complete."""
        path = Path(self.state.locations.local_run(self.run_key)) / "report.html"
        return path if path.exists() else None

    @property
    def table(self) -> pd.DataFrame:
        """The metrics of the final table as numbers: a row for the teacher, then two per student, pruned and distilled.

        KL and loss are in nats per token, agreement and accuracies between 0 and 1.
        """
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
        """The output of a finished stage, for example `result.output(Search, "smollm2-90m").ranking`.

        stage: its class. model: name of a model of the family, by default the first; has no effect for stages that the family
        shares. Raises InputError for an unknown model, and for a stage that is not finished.
        """
        if not (isinstance(stage, type) and issubclass(stage, Stage)):
            raise InputError(
                f"stage: {stage!r} is not a stage", "give its class, such as minitron_platform.stages.search.Search"
            )
        members = {member.model: member for member in self.state.recipe.family}
        name = next(iter(members)) if model is None else model
        if name not in members:
            raise InputError(f"model: {name!r} is not in the recipe's family", f"use one of {', '.join(members)}")
        member = members[name] if stage.per_model else None
        if not self.state.is_finished(stage, member):
            title = f"{stage.name} of {name}" if member else stage.name
            raise InputError(
                f"stage {title} is not finished in this run", "run the recipe to that stage, or to its end"
            )
        return self.state.output(stage, member)

    def __repr__(self) -> str:
        students = ", ".join(
            f"{self.output(Register, s.model).title}: {s.parameters:,} parameters, KL {s.kl:.3f}" for s in self.students
        )
        return f"RunResult({self.run_key}: {students or 'no student yet'})"

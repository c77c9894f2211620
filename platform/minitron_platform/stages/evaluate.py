"""Evaluate: held-out metrics, benchmarks and throughput of the teacher, the pruned and the distilled student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.markup import escape
from torch import nn

from minitron import storage
from minitron.device import DTYPES, device
from minitron.errors import one_line
from minitron.evaluation import Score, Task, evaluate, interleaved_throughput
from minitron.evaluation.documents import documents_identity
from minitron.evaluation.metrics import AGREEMENT, KL, LOSS, Metric
from minitron.logits import Head
from minitron.models import load_model, load_tokenizer
from minitron_platform.estimates.memory import evaluation_memory
from minitron_platform.estimates.outlook import DOCUMENT_TOKENS, Estimate, Outlook
from minitron_platform.estimates.phases import evaluation_parts
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import lm_eval_tasks
from minitron_platform.stages.base import pruning_base
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.context import Context
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.stage import Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.targets import Targets, distill_inputs
from minitron_platform.stages.teacher import Teacher

MODELS = ("teacher", "pruned", "distilled")


class Quality(BaseModel):
    """Measurements of one model's quality.

    A field with a `Metric` is a row of the final table and a metric in MLflow; it has the name of a field of
    `minitron.evaluation.HeldoutMetrics`.
    """

    model_config = ConfigDict(frozen=True)

    loss: Annotated[float, LOSS]
    kl: Annotated[float, KL]
    top1_agreement: Annotated[float, AGREEMENT]
    heldout_tokens: int
    """Number of tokens that the held-out metrics are means over."""
    tasks: dict[str, Score] = {}
    """Scores by benchmark."""
    failures: dict[str, str] = {}
    """Reasons of failures by benchmark."""


HELDOUT: dict[str, Metric] = {
    name: metadata
    for name, field in Quality.model_fields.items()
    for metadata in field.metadata
    if isinstance(metadata, Metric)
}
"""The held-out metrics by field of `Quality`, in the order of the final table."""


class Figures(Quality):
    """All measurements of one model: a column of the final table."""

    parameters: int
    tokens_per_second: float
    tokens_per_second_spread: float

    @property
    def numbers(self) -> dict[str, float]:
        """All measurements except the benchmarks, by field."""
        names = ("parameters", *HELDOUT, "tokens_per_second")
        return {name: getattr(self, name) for name in names}


class EvaluateOutput(StageOutput):
    table: dict[str, Figures]
    """Measurements of each of `MODELS`."""

    @property
    def failures(self) -> dict[str, str]:
        """Reasons of failed benchmarks, by "MODEL.TASK"."""
        return {f"{model}.{task}": reason for model, own in self.table.items() for task, reason in own.failures.items()}


class Evaluate(Stage[EvaluateOutput]):
    name = "evaluate"
    version = 2
    per_model = True
    output_type = EvaluateOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        return {
            "student": state.output(Distill).id,
            "targets": state.output(Targets).fingerprint,
            "base": pruning_base(state).id,
            "scores": state.output(Calibrate).id,
            **_settings(state),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        assert member is not None
        recipe = outlook.recipe
        seq_length = recipe.data.seq_length
        models = 3 if member is recipe.family[0] else 2  # the family shares the teacher's evaluation
        documents = sum(task.limit or 1000 for task in recipe.evaluate.tasks)
        tokens = documents * DOCUMENT_TOKENS + recipe.data.heldout_rows * seq_length
        tasks = ", ".join(task.name for task in recipe.evaluate.tasks) or "held-out rows only"
        return Estimate(
            f"{models} models, {tasks}",
            flops=outlook.teacher.flops_per_token(seq_length) * models * tokens,
            start_up_seconds=10,
            memory=evaluation_memory(recipe, outlook.teacher, outlook.largest(member), outlook.value_bytes),
            parts=evaluation_parts(outlook, ([outlook.teacher] * (models - 2)) + [outlook.largest(member)] * 2),
        )

    def run(self, context: Context, folder: str) -> EvaluateOutput:
        dtype = DTYPES[context.output(Teacher).dtype]
        distilled = context.output(Distill)
        folders = {
            "teacher": context.output(Correct).folder,
            "pruned": distilled.pruned,
            "distilled": distilled.student,
        }
        models: dict[str, nn.Module] = {}
        for name, checkpoint in folders.items():
            context.console.status(f"loading the {name} model")
            models[name] = load_model(storage.fetch(checkpoint), dtype).to(device())
        qualities = {name: _quality(context, name, models, folder) for name in MODELS}
        speeds = _speeds(context, models, storage.join(folder, "throughput.json"))
        table = {
            name: Figures(
                **dict(qualities[name]),
                tokens_per_second=speeds[name]["tokens_per_second"],
                tokens_per_second_spread=speeds[name]["spread"],
                parameters=models[name].num_parameters(),  # type: ignore[operator]
            )
            for name in MODELS
        }
        pruned_kl = KL.text(table["pruned"].kl)
        distilled_kl = KL.text(table["distilled"].kl)
        output = EvaluateOutput(table=table, summary=f"KL to the teacher: pruned {pruned_kl}, distilled {distilled_kl}")
        if not output.failures:
            return output
        failed = f"failed, to be tried again by the next run: {', '.join(output.failures)}"
        return output.model_copy(update={"summary": f"{output.summary} · {failed}"})

    def record(self, context: Context, output: EvaluateOutput) -> None:
        """Tag the stage's MLflow run with the benchmarks that failed."""
        failed = [f"{name}: {reason}" for name, reason in output.failures.items()]
        context.log(self.name).tags({"minitron.failed_benchmarks": "; ".join(failed) or "none"})

    def metrics(self, output: EvaluateOutput) -> dict[str, float]:
        """All measurements of all models."""
        values: dict[str, float] = {}
        for model, figures in output.table.items():
            values |= {f"{model}.{name}": value for name, value in figures.numbers.items()}
            for task, score in figures.tasks.items():
                name = f"{model}.{task}.{score.metric}"
                values[name] = score.value
                if score.stderr is not None:
                    values[f"{name}_stderr"] = score.stderr
        return values

    def is_valid(self, state: RunState, output: EvaluateOutput) -> bool:
        """Whether no benchmark failed; the stage runs only the failed ones again."""
        return not output.failures


def _settings(state: RunState) -> dict[str, Any]:
    """Everything that a model's measurements depend on besides the model."""
    return {
        "evaluate": state.recipe.evaluate.model_dump(exclude={"batch_rows", "allow_code"}),
        "documents": [documents_identity(task.data) for task in state.recipe.evaluate.tasks if task.data],
        "lm_eval": version("lm_eval"),
    }


def _speeds(context: Context, models: dict[str, nn.Module], path: str) -> dict[str, Any]:
    """Throughput of each model; measured once and stored."""
    if not storage.exists(path):
        context.console.status("measuring throughput")
        speeds = interleaved_throughput(models, seq_length=context.output(Data).seq_length, batch_rows=4, seconds=4.0)
        storage.write_json(path, {name: asdict(speed) for name, speed in speeds.items()})
    measured: dict[str, Any] = storage.read_json(path)
    return measured


def _quality(context: Context, name: str, models: dict[str, nn.Module], folder: str) -> Quality:
    """Held-out metrics and benchmark scores of model `name`; what is stored already is not measured again."""
    path = storage.join(folder, f"{name}.json")
    if name == "teacher":  # shared by the whole family
        key = {
            "targets": context.output(Targets).fingerprint,
            "version": Evaluate.version,
            **_settings(context),
        }
        path = storage.join(context.locations.storage, "quality", f"{storage.fingerprint(key)}.json")
    tasks = lm_eval_tasks(context.recipe.evaluate.tasks, context.recipe.evaluate.allow_code)
    quality = _read_quality(path)
    results = []  # for the console
    if quality is None:
        context.console.status(f"{name}: held-out rows")
        heldout = distill_inputs(context).heldout(models[name], Head.of(models["teacher"]))
        quality = Quality(
            **{field: getattr(heldout, field) for field in HELDOUT},
            heldout_tokens=heldout.tokens,
        )
        storage.write_json(path, quality.model_dump(mode="json"))
        results = [f"loss {LOSS.text(quality.loss)}", f"KL {KL.text(quality.kl)}"]
    missing = [task for task in tasks if task.name not in quality.tasks]
    if missing:
        scores, failures = _scores(context, name, models[name], missing)
        all_scores = quality.tasks | scores
        ordered = {task.name: all_scores[task.name] for task in tasks if task.name in all_scores}
        quality = quality.model_copy(update={"tasks": ordered, "failures": failures})
        storage.write_json(path, quality.model_dump(mode="json"))
        results += [f"{task} {score.shown_as.sentence(score.value, score.stderr)}" for task, score in scores.items()]
    if results:
        context.console.say(f"  {name}: {' · '.join(results)}")
    return quality


def _read_quality(path: str) -> Quality | None:
    """The stored measurements; None if there are none, or if an earlier version stored fewer metrics."""
    if not storage.exists(path):
        return None
    try:
        return Quality.model_validate(storage.read_json(path))
    except ValidationError:
        return None


def _scores(
    context: Context, name: str, model: nn.Module, tasks: Sequence[Task]
) -> tuple[dict[str, Score], dict[str, str]]:
    """Scores by task, and the reasons of the failed tasks, which are printed too."""
    context.console.status(f"{name}: preparing benchmarks")
    failures: dict[str, str] = {}

    def on_failure(task: str, error: Exception) -> None:
        failures[task] = one_line(error)
        context.console.say(f"  [yellow]{name}: {task} failed and is left out: {escape(failures[task])}[/]")

    scores = evaluate(
        model,
        load_tokenizer(storage.fetch(context.output(Teacher).folder)),
        tasks,
        batch_size=context.recipe.evaluate.batch_rows,
        add_bos=context.recipe.data.bos,
        progress=context.console.counter("documents"),
        on_failure=on_failure,
    )
    return scores, failures

"""Evaluate: held-out metrics, benchmarks and throughput of the teacher, the pruned and the distilled student."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.markup import escape
from torch import nn

from minitron import storage
from minitron.checkpoints.identity import checkpoint_identity
from minitron.distill.inputs import DistillInputs
from minitron.errors import one_line
from minitron.evaluation import Score, Task, interleaved_throughput
from minitron.evaluation.batches import BatchRows
from minitron.evaluation.documents import documents_identity
from minitron.evaluation.metrics import AGREEMENT, KL, LOSS, Metric
from minitron.logits import Head
from minitron.models import load_tokenizer
from minitron.processes import from_first, is_sharded, own_rank
from minitron_platform.estimates.memory import evaluation_memory
from minitron_platform.estimates.node_memory import forward_work
from minitron_platform.estimates.outlook import Estimate, Outlook
from minitron_platform.estimates.phases import evaluation_parts
from minitron_platform.gates.documents import add_tasks, documents_path, write_rows
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import examples_input, worker_tasks
from minitron_platform.stages.base import pruning_base
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.context import Context
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.stage import Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.targets import Targets, distill_inputs
from minitron_platform.stages.teacher import Teacher, chat_template_input, generation_input
from minitron_platform.tracking.events import BENCHMARK_TAG
from minitron_platform.workers import models
from minitron_platform.workers.worker import Worker
from minitron_search.memory import release_memory

MODELS = ("teacher", "pruned", "distilled")
NOT_THE_SCORES = {"batch_rows", "allow_code", "prompts", "throughput", "training_limit"}  # keys that change no score
COMPLETION_TOKENS = 64  # longest completion of a prompt


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
    task_numbers: dict[str, dict[str, float]] = {}
    """By benchmark, all its metrics as `minitron.evaluation.Evaluated.numbers` has them; without the benchmarks that an earlier
    version measured."""
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
    tokens_per_second: float | None = None
    """None unless the recipe says `evaluate.throughput`."""
    tokens_per_second_spread: float | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """All measurements except the benchmarks, by field."""
        names = ("parameters", *HELDOUT, *(["tokens_per_second"] if self.tokens_per_second is not None else []))
        return {name: getattr(self, name) for name in names}


class Completions(BaseModel):
    """How each of `MODELS` continues the recipe's `evaluate.prompts`, by the most probable token each time."""

    model_config = ConfigDict(frozen=True)

    prompts: list[str]
    texts: dict[str, list[str]]
    """By model, a text for each prompt, without the prompt."""


class EvaluateOutput(StageOutput):
    table: dict[str, Figures]
    """Measurements of each of `MODELS`."""
    completions: Completions | None = None
    """None if the recipe has no prompts."""

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
            **({"prompts": state.recipe.evaluate.prompts} if state.recipe.evaluate.prompts else {}),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        assert member is not None
        recipe = outlook.recipe
        models = 3 if member is recipe.family[0] else 2  # the family shares the teacher's evaluation
        tasks = [task.name for task in recipe.evaluate.tasks] or ["held-out rows only"]
        return Estimate(
            ", ".join([f"{models} models", *tasks, *(["throughput"] if recipe.evaluate.throughput else [])]),
            start_up_seconds=10,
            memory=evaluation_memory(recipe, outlook.teacher, outlook.largest(member), outlook.value_bytes),
            node=forward_work([outlook.teacher, outlook.largest(member)], outlook.value_bytes, outlook.resources),
            parts=evaluation_parts(outlook, ([outlook.teacher] * (models - 2)) + [outlook.largest(member)] * 2),
        )

    def run(self, context: Context, folder: str) -> EvaluateOutput:
        distilled = context.output(Distill)
        folders = {
            "teacher": context.output(Correct).folder,
            "pruned": distilled.pruned,
            "distilled": distilled.student,
        }
        stored = {name: _quality_path(context, name, folder) for name in MODELS}
        speeds = storage.join(folder, "throughput.json") if context.recipe.evaluate.throughput else None
        evaluation = Evaluation(
            inputs=distill_inputs(context),
            tokenizer=context.output(Teacher).folder,
            models=folders,
            stored=stored,
            speeds=speeds,
            tasks=worker_tasks(context.recipe.evaluate),
            batch_rows=context.recipe.evaluate.batch_rows,
            add_bos=context.recipe.data.bos,
            answers=context.locations.answers,
            prompts=tuple(context.recipe.evaluate.prompts),
            completed={name: storage.join(folder, f"completions-{name}.json") for name in MODELS},
        )
        if not Finished.of(evaluation).is_everything(evaluation):
            context.workers.compute(_evaluate, evaluation)
        measured = storage.read_json(speeds) if speeds else {}
        table = {}
        for name in MODELS:
            quality = read_quality(stored[name])
            assert quality is not None
            # a pruned student and what it is distilled to have the same shapes
            speed = measured.get(name) or measured.get("distilled", {})
            table[name] = Figures(
                **dict(quality),
                tokens_per_second=speed.get("tokens_per_second"),
                tokens_per_second_spread=speed.get("spread"),
                parameters=context.output(Teacher).parameters if name == "teacher" else distilled.parameters,
            )
        pruned_kl = KL.text(table["pruned"].kl)
        distilled_kl = KL.text(table["distilled"].kl)
        output = EvaluateOutput(
            table=table,
            completions=evaluation.completions(),
            summary=f"KL to the teacher: pruned {pruned_kl}, distilled {distilled_kl}",
        )
        if not output.failures:
            return output
        failed = f"failed, to be tried again by the next run: {', '.join(output.failures)}"
        return output.model_copy(update={"summary": f"{output.summary} · {failed}"})

    def record(self, context: Context, output: EvaluateOutput) -> None:
        """Tag the stage's MLflow run with the benchmarks that failed, and with what the others were measured on."""
        failed = [f"{name}: {reason}" for name, reason in output.failures.items()]
        scores = {task: score for figures in output.table.values() for task, score in figures.tasks.items()}
        measured_on = {f"{BENCHMARK_TAG}{task}": f"{score.metric}, {score.settings}" for task, score in scores.items()}
        context.log(self.name).tags({"minitron.failed_benchmarks": "; ".join(failed) or "none", **measured_on})

    def metrics(self, output: EvaluateOutput) -> dict[str, float]:
        """All measurements of all models."""
        values: dict[str, float] = {}
        for model, figures in output.table.items():
            values |= {f"{model}.{name}": value for name, value in figures.numbers.items()}
            values |= score_metrics(figures.tasks, f"{model}.")
            for task in figures.tasks:
                values |= {f"{model}.{number}": value for number, value in figures.task_numbers.get(task, {}).items()}
        return values

    def is_valid(self, state: RunState, output: EvaluateOutput) -> bool:
        """Whether no benchmark failed, and the throughput is known if the recipe wants it; the stage runs only for these."""
        timed = all(figures.tokens_per_second is not None for figures in output.table.values())
        return not output.failures and (timed or not state.recipe.evaluate.throughput)


def score_metrics(tasks: Mapping[str, Score], prefix: str = "") -> dict[str, float]:
    """Scores, their standard errors and numbers of documents as metrics of MLflow, whose names begin with `prefix`."""
    values: dict[str, float] = {}
    for task, score in tasks.items():
        name = f"{prefix}{task}.{score.metric}"
        values[name] = score.value
        values[f"{prefix}{task}.documents"] = score.num_documents
        if score.stderr is not None:
            values[f"{name}_stderr"] = score.stderr
    return values


def _settings(state: RunState) -> dict[str, Any]:
    """Everything that a model's measurements depend on besides the model."""
    return {
        "evaluate": state.recipe.evaluate.model_dump(exclude=NOT_THE_SCORES),
        "documents": [documents_identity(task.data) for task in state.recipe.evaluate.tasks if task.data],
        "lm_eval": version("lm_eval"),
        **examples_input(state.recipe.evaluate.tasks),
        **chat_template_input(state, any(task.chat_template for task in state.recipe.evaluate.tasks)),
        **generation_input(state, bool(state.recipe.evaluate.tasks or state.recipe.evaluate.prompts)),
    } | ({"task_folder": documents_identity(folder)} if (folder := state.recipe.evaluate.task_folder) else {})


def measurement_fingerprint(state: RunState) -> str:
    """Fingerprint of everything that the measurements of a model outside the recipe, such as the teacher or a variant of a
    student, depend on besides that model."""
    return storage.fingerprint(
        {"targets": state.output(Targets).fingerprint, "version": Evaluate.version, **_settings(state)}
    )


def results_of_documents(context: Context, name: str) -> str:
    """File of the results of every held-out row and every document of the benchmarks for one of `MODELS`. There is none for a
    model that an earlier version evaluated."""
    folder = context.locations.stage(Evaluate.name, context.output(Evaluate).fingerprint)
    return documents_path(_quality_path(context, name, folder))


def _quality_path(context: Context, name: str, folder: str) -> str:
    """File of the measurements of model `name`; the family shares those of the teacher."""
    if name != "teacher":
        return storage.join(folder, f"{name}.json")
    return storage.join(context.locations.storage, "quality", f"{measurement_fingerprint(context)}.json")


@dataclass(frozen=True)
class Evaluation:
    """What is to be measured of which models, and where it is stored."""

    inputs: DistillInputs
    tokenizer: str
    """Checkpoint folder of the tokenizer."""
    models: dict[str, str]
    """Checkpoint folder by name."""
    stored: dict[str, str]
    """File of each model's measurements, by name."""
    speeds: str | None
    """File of the throughputs; None if they are not measured."""
    tasks: tuple[Task, ...]
    batch_rows: BatchRows
    add_bos: bool | None
    answers: str
    """Folder of the answers to benchmarks."""
    prompts: tuple[str, ...]
    completed: dict[str, str]
    """File of each model's completions of the prompts, by name."""

    def completions(self) -> Completions | None:
        """The stored completions; None without prompts."""
        if not self.prompts:
            return None
        texts = {name: storage.read_json(path) for name, path in self.completed.items()}
        return Completions(prompts=list(self.prompts), texts=texts)

    def load(self, worker: Worker, name: str) -> nn.Module:
        """A model, on this process's device, or its part of one that is split over the workers."""
        return models.load(worker, self.models[name], self.inputs.dtype)


class Finished(BaseModel):
    """What is stored of an evaluation."""

    model_config = ConfigDict(frozen=True)

    qualities: dict[str, Quality]
    """By model; those without a benchmark that is wanted, too."""
    completed: list[str]
    """Models that have continued the prompts."""
    timed: bool

    @classmethod
    def of(cls, task: Evaluation, *, together: bool = False) -> Finished:
        """What the first process sees, in all that work `together`: a worker of an earlier driver may still write there,
        and they must measure a model together or not at all."""
        content = json.dumps(cls._seen(task).model_dump(mode="json")) if own_rank(together) == 0 else ""
        return cls.model_validate(json.loads(from_first(content.encode(), together)))

    @classmethod
    def _seen(cls, task: Evaluation) -> Finished:
        read = {name: read_quality(path) for name, path in task.stored.items()}
        return cls(
            qualities={name: quality for name, quality in read.items() if quality is not None},
            completed=[name for name, path in task.completed.items() if task.prompts and storage.exists(path)],
            timed=task.speeds is not None and storage.exists(task.speeds),
        )

    def has_scores(self, name: str, tasks: Sequence[Task]) -> bool:
        """Whether the held-out metrics and all benchmarks of a model are stored."""
        return name in self.qualities and all(task.key in self.qualities[name].tasks for task in tasks)

    def is_everything(self, task: Evaluation) -> bool:
        """Whether nothing remains to be measured."""
        completed = not task.prompts or len(self.completed) == len(task.completed)
        timed = task.speeds is None or self.timed
        return completed and timed and all(self.has_scores(name, task.tasks) for name in task.stored)


def _evaluate(task: Evaluation, worker: Worker) -> None:
    """Measure what is not stored yet: one model after the other, by all processes together, then the throughputs."""
    finished = Finished.of(task, together=worker.count > 1)
    for name in task.stored:
        if not finished.has_scores(name, task.tasks):
            _load_and_measure(task, worker, name, finished.qualities.get(name))
            release_memory()
        if task.prompts and name not in finished.completed:
            _complete(task, worker, name)
            release_memory()
    if task.speeds is not None and not finished.timed:
        _measure_speeds(task, task.speeds, worker)


def _measure_speeds(task: Evaluation, path: str, worker: Worker) -> None:
    """Measure the throughputs, in the first process; in all of them if a model does not fit on a GPU."""
    worker.progress.status("measuring throughput")
    names = ("teacher", "distilled")
    if models.fit(worker, [task.models[name] for name in names], task.inputs.dtype):
        if not worker.is_first:
            return
        worker = replace(worker, count=1)
    seq_length = task.inputs.open_rows("heldout").seq_length
    loaded = {name: task.load(worker, name) for name in names}
    speeds = interleaved_throughput(loaded, seq_length=seq_length, batch_rows=4, seconds=4.0)
    if worker.is_first:
        worker.before_commit()
        storage.write_json(path, {name: asdict(speed) for name, speed in speeds.items()})


def _complete(task: Evaluation, worker: Worker, name: str) -> None:
    """Write how model `name` continues the prompts."""
    from minitron.evaluation.generation import Sampling, complete

    worker.progress.status(f"{name}: completing prompts")
    model = task.load(worker, name)
    split = worker.count > 1 and is_sharded(model)
    if not (split or worker.is_first):
        return
    tokenizer = load_tokenizer(storage.fetch(task.tokenizer, weights=False))
    sampling = Sampling(max_new_tokens=COMPLETION_TOKENS)
    texts = [complete(model, tokenizer, each, sampling, add_bos=task.add_bos, in_step=split) for each in task.prompts]
    if worker.is_first:
        worker.before_commit()
        storage.write_json(task.completed[name], texts)


def _load_and_measure(task: Evaluation, worker: Worker, name: str, quality: Quality | None) -> None:
    worker.progress.status(f"loading the {name} model")
    measure(task, worker, name, task.load(worker, name), quality)


def measure(task: Evaluation, worker: Worker, name: str, model: nn.Module, quality: Quality | None) -> Quality:
    """Held-out metrics and benchmark scores of a loaded model, which are stored in `task.stored[name]`, too. quality: what is
    stored already, which is not measured again."""
    from minitron.evaluation import evaluate_documents  # imports lm-eval
    from minitron.evaluation.answers import AnswerStore

    path = task.stored[name]
    together = worker.count > 1
    results = []  # for the user
    if quality is None:
        worker.progress.status(f"{name}: held-out rows")
        head = Head.of(model) if name == "teacher" else task.inputs.teacher_head()
        heldout = task.inputs.heldout(model, head, together=together)
        quality = Quality(
            **{field: getattr(heldout, field) for field in HELDOUT},
            heldout_tokens=heldout.tokens,
        )
        if worker.is_first:
            worker.before_commit()
            write_rows(documents_path(path), heldout.per_row_loss, heldout.per_row_kl or [])
            storage.write_json(path, quality.model_dump(mode="json"))
        results = [f"loss {LOSS.text(quality.loss)}", f"KL {KL.text(quality.kl)}"]
    missing = [one for one in task.tasks if one.key not in quality.tasks]
    if missing:
        worker.progress.status(f"{name}: preparing benchmarks")
        failures: dict[str, str] = {}

        def on_failure(benchmark: str, error: Exception) -> None:
            failures[benchmark] = one_line(error)
            worker.progress.say(
                f"  [yellow]{name}: {escape(benchmark)} failed and is left out: {escape(failures[benchmark])}[/]"
            )

        tokenizer = load_tokenizer(storage.fetch(task.tokenizer, weights=False))
        identity = checkpoint_identity(storage.fetch(task.models[name]), tokenizer)
        evaluated = evaluate_documents(
            model,
            tokenizer,
            missing,
            batch_size=task.batch_rows,
            add_bos=task.add_bos,
            progress=worker.progress.counter("documents"),
            on_failure=on_failure,
            together=together,
            answers=AnswerStore(task.answers, identity),
        )
        scores = {key: result.score for key, result in evaluated.items()}
        all_scores = quality.tasks | scores
        ordered = {one.key: all_scores[one.key] for one in task.tasks if one.key in all_scores}
        numbers = quality.task_numbers | {key: result.numbers(key) for key, result in evaluated.items()}
        quality = quality.model_copy(update={"tasks": ordered, "task_numbers": numbers, "failures": failures})
        if worker.is_first:
            worker.before_commit()
            add_tasks(documents_path(path), evaluated)
            storage.write_json(path, quality.model_dump(mode="json"))
        results += [f"{benchmark} {score.sentence}" for benchmark, score in scores.items()]
    if results:
        worker.progress.say(f"  {name}: {escape(' · '.join(results))}")
    return quality


def read_quality(path: str) -> Quality | None:
    """The stored measurements; None if there are none, or if an earlier version stored fewer metrics."""
    if not storage.exists(path):
        return None
    try:
        return Quality.model_validate(storage.read_json(path))
    except ValidationError:
        return None

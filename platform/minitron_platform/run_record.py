"""The MLflow record of a whole run, the parent of its stages' records: what people search, filter and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from minitron import storage
from minitron.evaluation.metrics import AGREEMENT, KL
from minitron.text import markdown
from minitron_platform.cluster.hardware import Hardware
from minitron_platform.recipes.build import heldout_source, text_sources
from minitron_platform.recipes.schema import Recipe
from minitron_platform.source_tags import source_tags
from minitron_platform.stages.context import Context
from minitron_platform.stages.data import Data
from minitron_platform.stages.evaluate import Evaluate
from minitron_platform.stages.search import Search
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.events import Status
from minitron_platform.tracking.mlflow_runs import KIND_TAG, NOTE, RUN_KIND
from minitron_platform.tracking.spool import RunLog

RECIPE_FILE = "recipe.yaml"
MAX_METRICS = 12  # results in the parent; all are in the record of the stage `evaluate`


class RunRecord:
    """The record of a run. The first stage that records something opens it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.log = context.spool.record(context.run_key)
        self.open = False
        self._hardware: Hardware | None = None

    def stage_log(self, name: str) -> RunLog:
        """The record of a stage; opens this record unless both are finished."""
        log = self.context.log(name)
        if not (self.log.is_finished and log.is_finished):
            self.reopen()
        return log

    def reopen(self) -> None:
        """Start the record if it is not open: with the recipe, so that a run that fails has it too."""
        if self.open:
            return
        recipe = self.context.recipe
        tags = {KIND_TAG: RUN_KIND, "minitron.recipe": recipe.name, NOTE: description(self.context)}
        tags |= source_tags("minitron run")
        self.log.start(self.context.run_key, tags=tags)
        self.log.params({**parameters(recipe), "separate_documents": self.context.separate_documents})
        self.log.artifact(storage.join(self.context.locations.run(self.context.run_key), RECIPE_FILE))
        self.open = True

    def hardware(self, used: Hardware) -> bool:
        """Note what the run computes on, when its first stage begins to compute; returns whether it is the first."""
        if self._hardware is not None:
            return False
        self._hardware = used
        self.log.params({"hardware": used.text})
        used.write(self.context.locations.run(self.context.run_key))
        return True

    def system(self, values: Mapping[str, float], time: int) -> None:
        """Add the load of this machine at a Unix time, in seconds, while the record is open."""
        if self.open:
            self.log.metrics(values, step=time)

    def finished_stage(self, name: str) -> None:
        """Add what a finished stage says about the whole run."""
        if not self.open:
            return
        if name == Data.name:
            data = self.context.output(Data)
            text = self.context.recipe.data
            sources = ", ".join(source.label for source in text_sources(text).values())
            own = heldout_source(text)
            for context, name, digest, tokens in (
                ("training", sources, data.train, data.train_tokens),
                ("heldout", own.label if own else sources, data.heldout, data.heldout_tokens),
            ):
                self.log.dataset(name, digest=digest, source=data.folder, context=context, tokens=tokens)
        elif name == Search.name:
            model = self.context.member.model
            self.log.params({f"architecture.{model}": self.context.output(Search).winner})

    def results(self) -> None:
        """Add the results of all models, at the end of the run."""
        self.log.tags({NOTE: description(self.context)})
        for model, values in headline(self.context).items():
            prefix = f"{model}." if len(self.context.recipe.family) > 1 else ""
            member = next(member for member in self.context.recipe.family if member.model == model)
            fingerprint = self.context.output(Evaluate, member).fingerprint
            self.log.metrics({prefix + name: value for name, value in values.items()}, step=0, of=fingerprint)

    def end(self, status: Status) -> None:
        """End the record with `status` if it is open."""
        if self.open:
            self.log.end(status)
            self.open = False


def parameters(recipe: Recipe) -> dict[str, Any]:
    """What runs are filtered and compared by."""
    values: dict[str, Any] = {
        "teacher": recipe.teacher.model,
        "data": ", ".join(source.label for source in text_sources(recipe.data).values()),
        "seq_length": recipe.data.seq_length,
        "train_rows": recipe.data.train_rows,
        "losses.logits": recipe.losses.logits,
        "losses.hidden": recipe.losses.hidden,
        "layers_by": recipe.calibrate.layers,
    }
    trainings = {"search": recipe.search.training}
    for member in recipe.family:
        values[f"target_parameters.{member.model}"] = member.parameters
        name = f"distill.{member.model}" if member.distill else "distill"
        trainings[name] = recipe.distillation(member)
    for name, training in trainings.items():
        for field in ("steps", "batch_rows", "peak_lr", "min_lr", "warmup_steps", "optimizer"):
            values[f"{name}.{field}"] = getattr(training, field)
    return values


def headline(state: RunState) -> dict[str, dict[str, float]]:
    """The most important metrics by model, together at most MAX_METRICS."""
    room = max(1, MAX_METRICS // len(state.recipe.family))
    chosen = {}
    for member in state.recipe.family:
        figures = state.output(Evaluate, member).table["distilled"]
        values = {"distilled.kl": figures.kl, "distilled.loss": figures.loss}
        values["distilled.top1_agreement"] = figures.top1_agreement
        values |= {f"distilled.{task}.{score.metric}": score.value for task, score in figures.tasks.items()}
        values |= {"pruned.kl": state.output(Evaluate, member).table["pruned"].kl}
        chosen[member.model] = dict(list(values.items())[:room])
    return chosen


def description(state: RunState) -> str:
    """What the run does, and its results as far as they are there, in Markdown."""
    recipe = state.recipe
    sizes = ", ".join(f"{markdown(member.model)} ({member.parameters:,} parameters)" for member in recipe.family)
    lines = [f"{markdown(recipe.description)}", "", f"**{markdown(recipe.teacher.model)}** → {sizes}", ""]
    return "\n".join([*lines, *_table(state)])


def _table(state: RunState) -> Iterator[str]:
    finished = [member for member in state.recipe.family if state.is_finished(Evaluate, member)]
    if finished:
        yield f"| model | parameters | {KL.title}, pruned only | distilled | {AGREEMENT.title} |"
        yield "|---|---:|---:|---:|---:|"
    for member in finished:
        pruned, figures = (state.output(Evaluate, member).table[name] for name in ("pruned", "distilled"))
        cells = [markdown(member.model), f"{figures.parameters:,}", KL.text(pruned.kl), KL.text(figures.kl)]
        yield f"| {' | '.join([*cells, AGREEMENT.text(figures.top1_agreement)])} |"
    if finished:
        yield ""
        yield "All results are in the artifact `report.html`."

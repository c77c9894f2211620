"""The MLflow record of `minitron evaluate`: a run for each model, which is kept in the storage until MLflow has it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape

from minitron import storage
from minitron.errors import MinitronError, StorageError, one_line
from minitron.evaluation import Task
from minitron.evaluation.metrics import error_note
from minitron.evaluation.result_file import ModelResults, results_json
from minitron.storage import redact
from minitron.text import markdown
from minitron_platform.console import Console
from minitron_platform.leases import lease
from minitron_platform.locations import Locations
from minitron_platform.source_tags import source_tags
from minitron_platform.stages.evaluate import score_metrics
from minitron_platform.tracking.events import status_of
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.mlflow_runs import KIND_TAG, NOTE
from minitron_platform.tracking.spool import RunLog, Spool

EVALUATION_KIND = "evaluation"
FAILED_TAG = "minitron.failed_benchmarks"  # as in the record of a stage


@dataclass
class EvaluationRecord:
    """The records of the models of one command.

    key: of the command, in the storage. suite: {name, version} if the tasks are those of a suite.
    """

    locations: Locations
    key: str
    spool: Spool
    tasks: Sequence[Task]
    suite: Mapping[str, Any] | None
    console: Console
    models: int = 0

    def score(self, model: str, scored: Callable[[str], ModelResults]) -> ModelResults:
        """`scored(model)`, recorded from its beginning to its end."""
        self.models += 1
        log = self.spool.record(f"{self.key}.{self.models}")
        name = redact(model)
        log.start(Path(name).name or name, tags={KIND_TAG: EVALUATION_KIND, **source_tags("minitron evaluate")})
        log.params({"model": name, **self._settings()})
        try:
            result = scored(model)
        except BaseException as error:
            log.end(status_of(error))
            raise
        self._add(log, result)
        log.end("FINISHED" if result.tasks else "FAILED")
        return result

    def _settings(self) -> dict[str, Any]:
        values: dict[str, Any] = {"tasks": ", ".join(task.key for task in self.tasks)}
        if self.suite is not None:
            values |= {"suite": self.suite["name"], "suite_version": self.suite["version"]}
        for task in self.tasks:
            values |= {f"{task.key}.num_fewshot": task.num_fewshot, f"{task.key}.limit": task.limit or "none"}
        return values

    def _add(self, log: RunLog, result: ModelResults) -> None:
        scores = {key: each.score for key, each in result.tasks.items()}
        names = ("identity", "parameters", "dtype", "device", "engine")
        known = {name: value for name in names if (value := getattr(result, name)) is not None}
        log.params(known | {f"{key}.measured_on": score.settings for key, score in scores.items()})
        values = score_metrics(scores)
        for key, each in result.tasks.items():
            values |= each.numbers(key)
        log.metrics(values, step=0)
        failed = [f"{key}: {reason}" for key, reason in result.failures.items()]
        log.tags({NOTE: _description(result), FAILED_TAG: "; ".join(failed) or "none"})
        path = storage.join(self.locations.run(self.key), str(self.models), "results.json")
        try:
            storage.write_json(path, results_json([result], self.tasks, self.suite))
        except StorageError as error:
            self.console.say(f"[yellow]{escape(one_line(error))}: MLflow gets no file of results[/]")
        else:
            log.artifact(path)


@contextmanager
def evaluation_record(
    locations: Locations,
    experiment: str,
    tasks: Sequence[Task],
    suite: Mapping[str, Any] | None,
    console: Console,
) -> Iterator[EvaluationRecord]:
    """Records that are sent to an MLflow experiment from the background, until the end of the block.

    Raises MinitronError at its end for records that MLflow did not take: they are kept in the storage for `minitron sync`.
    """
    key = f"evaluation-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    with ExitStack() as stack:
        # `minitron sync` leaves the records alone meanwhile
        stack.enter_context(lease(locations, f"run-{key}", key, run=key, console=console))
        spool = Spool(locations.spool(key), experiment=experiment)
        stack.callback(spool.close)
        flusher = Flusher(spool, locations.tracking_uri, experiment)
        try:
            yield EvaluationRecord(locations, key, spool, tasks, suite, console)
        except BaseException as error:
            flusher.__exit__(type(error), error, error.__traceback__)
            raise
        with console.working("closing"):
            console.status(flusher.text)
            unsent = flusher.close()
    address = escape(redact(locations.tracking_uri))
    if unsent:
        raise MinitronError(
            f"MLflow at {redact(locations.tracking_uri)} lacks {unsent:,} records of the evaluation; they stay in "
            f"{locations.storage}, with the results",
            "check that MLflow answers, and run `minitron sync` with the same --storage and --tracking-uri",
        )
    if refused := flusher.refused():
        raise MinitronError(
            f"MLflow at {redact(locations.tracking_uri)} refused {refused:,} records of the evaluation",
            "the warnings above say why",
        )
    console.say(f"in experiment [bold]{escape(experiment)}[/] of MLflow at {address}")


def _description(result: ModelResults) -> str:
    """The scores, in Markdown."""
    lines = ["| task | metric | score | measured on |", "|---|---|---:|---|"]
    for key, each in result.tasks.items():
        score = each.score
        cells = (key, score.shown_as.title, score.text, score.settings)
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    if note := error_note(each.score.stderr for each in result.tasks.values()):
        lines += ["", f"{note}."]
    return "\n".join(lines)

"""The last rung: lm-eval on the best few, after their short distillation. It informs; the ranking stays that by KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.device import DTYPES, device
from minitron.errors import InputError, one_line
from minitron.evaluation import Task
from minitron.evaluation.documents import documents_identity
from minitron.models import load_model, load_tokenizer
from minitron_search.pool import Pool
from minitron_search.ranking import SearchResult, with_columns
from minitron_search.trial import Report, SearchTask, run_trial, trial_key, weights


@dataclass(frozen=True)
class Benchmarks:
    """The tasks that the best `keep` candidates get, with the tokenizer of the checkpoint folder `tokenizer`; requests begin
    as `add_bos` says (see `minitron.evaluation.evaluate`)."""

    tasks: tuple[Task, ...]
    keep: int
    tokenizer: str
    batch_rows: int = 8
    add_bos: bool | None = None

    def identity(self) -> dict[str, Any]:
        """What decides a model's scores besides the model."""
        return {
            "tasks": [asdict(task) for task in self.tasks],
            "documents": [documents_identity(task.data) for task in self.tasks if task.data],
            "lm_eval": version("lm_eval"),
            **({} if self.add_bos is None else {"add_bos": self.add_bos}),
        }

    def path(self, folder: str, architecture: Architecture) -> str:
        """Where a candidate's scores are kept."""
        name = f"benchmarks-{storage.fingerprint(self.identity())}.json"
        return storage.join(folder, trial_key(architecture), name)


def benchmark_best(
    task: SearchTask, result: SearchResult, architectures: Sequence[Architecture], benchmarks: Benchmarks, pool: Pool
) -> SearchResult:
    """The result of a search over `architectures`, with scores of its winner and the next best by KL, `benchmarks.keep` in all.

    Every task is two columns of the ranking, its name for the score and that with `_stderr`, NaN for the other candidates. A
    candidate with a benchmark that failed is added to the failures, with the reason, and stays in the ranking. Scores that are
    stored are read back; a candidate whose weights are gone is distilled again for them. Afterwards all weights are deleted.
    """
    by_name = {str(a): a for a in architectures}
    ordered = result.ranking.sort_values(["winner", "rank"], ascending=[False, True])["architecture"]
    best = [by_name[name] for name in ordered[: benchmarks.keep]]
    paths = {a: benchmarks.path(task.folder, a) for a in best}
    failed = pool.alone().run(
        partial(_benchmark, replace(task, keep_weights=True), benchmarks),
        best,
        lambda a: len(_scores(paths[a])) == len(benchmarks.tasks),
    )
    for architecture in architectures:
        storage.remove(weights(task.folder, architecture))
    scores = {str(a): found for a, path in paths.items() if (found := _scores(path))}
    columns: dict[str, dict[str, float | None]] = {}
    metrics = {name: score["metric"] for found in scores.values() for name, score in found.items()}
    for wanted in benchmarks.tasks:
        columns[wanted.name] = _column(scores, wanted.name, "value")
        columns[f"{wanted.name}_stderr"] = _column(scores, wanted.name, "stderr")
    reasons = {name: f"its benchmarks: {reason}" for name, reason in failed.items()}
    return with_columns(replace(result, failures={**result.failures, **reasons}, metrics=metrics), columns)


def _benchmark(task: SearchTask, benchmarks: Benchmarks, architecture: Architecture, report: Report) -> None:
    from minitron.evaluation import evaluate  # brings lm-eval

    run_trial(task, architecture, report)  # only where the weights are gone
    folder = storage.fetch(weights(task.folder, architecture))
    model = load_model(folder, DTYPES[task.materials.dtype]).to(device())
    tokenizer = load_tokenizer(storage.fetch(benchmarks.tokenizer))
    path, failed = benchmarks.path(task.folder, architecture), dict[str, Exception]()
    known = _scores(path)
    missing = [each for each in benchmarks.tasks if each.name not in known]
    scores = evaluate(
        model,
        tokenizer,
        missing,
        batch_size=benchmarks.batch_rows,
        add_bos=benchmarks.add_bos,
        on_failure=failed.__setitem__,
    )
    storage.write_json(path, known | {name: asdict(score) for name, score in scores.items()})
    report({"evaluated": len(scores)})
    if failed:
        reasons = [f"{name}: {one_line(error)}" for name, error in failed.items()]
        raise InputError("; ".join(reasons))  # of a kind that no second attempt at once would change


def _scores(path: str) -> dict[str, Any]:
    """A candidate's scores by task, as far as there are any."""
    found: dict[str, Any] = storage.read_json(path) if storage.exists(path) else {}
    return found


def _column(scores: dict[str, dict[str, Any]], task: str, figure: str) -> dict[str, float | None]:
    return {name: found[task][figure] for name, found in scores.items() if task in found}

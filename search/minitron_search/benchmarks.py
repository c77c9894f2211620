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
from minitron_search.arguments import check_type, check_types
from minitron_search.events import Report
from minitron_search.pool import Pool
from minitron_search.ranking import BenchmarkScore, RankedCandidate
from minitron_search.results import SearchResult
from minitron_search.trial import SearchTask, run_trial
from minitron_search.trial_store import trial_folder, weights


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
        return storage.join(trial_folder(folder, architecture), name)


def benchmark_best(
    task: SearchTask, result: SearchResult, architectures: Sequence[Architecture], benchmarks: Benchmarks, pool: Pool
) -> SearchResult:
    """The result of a search over `architectures`, with scores of its winner and the next best by KL, `benchmarks.keep` in all.

    A candidate with a benchmark that failed is added to the failures, with the reason, and stays in the ranking with the
    scores of its others. Scores that are stored are read back; a candidate whose weights are gone is distilled again for
    them. Afterwards all weights are deleted.
    """
    check_type("task", task, SearchTask)
    check_type("result", result, SearchResult)
    check_types("architectures", architectures, Architecture)
    check_type("benchmarks", benchmarks, Benchmarks)
    check_type("pool", pool, Pool)
    ordered = sorted(result.ranking, key=lambda candidate: (not candidate.winner, candidate.rank))
    best = [candidate.architecture for candidate in ordered[: benchmarks.keep]]
    paths = {architecture: benchmarks.path(task.folder, architecture) for architecture in best}
    failed = pool.alone().run(
        partial(_benchmark, replace(task, keep_weights=True), benchmarks),
        best,
        lambda architecture: len(_scores(paths[architecture])) == len(benchmarks.tasks),
    )
    for architecture in architectures:
        storage.remove(weights(task.folder, architecture))
    ranking = [
        _with_scores(candidate, benchmarks, paths[candidate.architecture])
        if candidate.architecture in paths
        else candidate
        for candidate in result.ranking
    ]
    reasons = {architecture: f"its benchmarks: {reason}" for architecture, reason in failed.items()}
    return replace(result, ranking=ranking, failures={**result.failures, **reasons})


def _with_scores(candidate: RankedCandidate, benchmarks: Benchmarks, path: str) -> RankedCandidate:
    scores = _scores(path)
    known = [(task.name, scores[task.name]) for task in benchmarks.tasks if task.name in scores]
    return replace(
        candidate,
        benchmarks=tuple(
            BenchmarkScore(name, score["metric"], score["value"], score["stderr"]) for name, score in known
        ),
    )


def _benchmark(task: SearchTask, benchmarks: Benchmarks, architecture: Architecture, report: Report) -> None:
    from minitron.evaluation import evaluate  # brings lm-eval

    run_trial(task, architecture, report)  # does something only where the weights are gone
    folder = storage.fetch(weights(task.folder, architecture))
    model = load_model(folder, DTYPES[task.materials.dtype]).to(device())
    tokenizer = load_tokenizer(storage.fetch(benchmarks.tokenizer))
    path = benchmarks.path(task.folder, architecture)
    failed: dict[str, Exception] = {}
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
    if failed:
        reasons = [f"{name}: {one_line(error)}" for name, error in failed.items()]
        raise InputError("; ".join(reasons))  # of a kind that no second attempt at once would change


def _scores(path: str) -> dict[str, Any]:
    """A candidate's stored scores by task."""
    scores: dict[str, Any] = storage.read_json(path) if storage.exists(path) else {}
    return scores

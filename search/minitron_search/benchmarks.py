"""lm-eval benchmarks of the best candidates after their short distillation, for information: the ranking stays by KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.arguments import check_fields, check_type, check_types
from minitron.device import DTYPES, device
from minitron.errors import InputError, one_line
from minitron.evaluation import Score, Task
from minitron.evaluation.batches import BatchRows
from minitron.evaluation.documents import documents_identity
from minitron.meta_models import load_onto
from minitron.models import load_tokenizer
from minitron.packages import PACKAGE
from minitron_search.arguments import absolute_path
from minitron_search.events import Report
from minitron_search.ranking import BenchmarkScore, RankedCandidate
from minitron_search.results import SearchResult
from minitron_search.search_task import SearchTask
from minitron_search.stored_trials import StoredTrials
from minitron_search.trial_store import trial_folder, weights

if TYPE_CHECKING:
    from minitron_search.pool import Pool


@dataclass(frozen=True)
class Benchmarks:
    """The lm-eval tasks to run on the best `keep` candidates, with the tokenizer of the checkpoint folder `tokenizer`.

    `add_bos` says whether requests begin with a BOS token (see `minitron.evaluation.evaluate`). `chat_template` and
    `generation` are fingerprints of the tokenizer's chat template, which counts for the tasks that use it, and of the models'
    generation settings: with others, stored scores are measured again. Relative paths are made absolute. Raises InputError
    for a path that is empty, and for a field of the wrong type.
    """

    tasks: tuple[Task, ...]
    keep: int
    tokenizer: str
    batch_rows: BatchRows = 8
    add_bos: bool | None = None
    chat_template: str = ""
    generation: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "tasks", tuple(map(_with_absolute_path, self.tasks)))
        object.__setattr__(self, "tokenizer", absolute_path("tokenizer", self.tokenizer))

    def identity(self) -> dict[str, Any]:
        """Everything besides the model that determines its scores."""
        templated = self.chat_template if any(task.chat_template for task in self.tasks) else ""
        return {
            "tasks": [task.settings() for task in self.tasks],
            "documents": [documents_identity(task.data) for task in self.tasks if task.data],
            "lm_eval": version("lm_eval"),
            **({} if self.add_bos is None else {"add_bos": self.add_bos}),
            **({"chat_template": templated} if templated else {}),
            **({"generation": self.generation} if self.generation else {}),
        }

    def path(self, folder: str, architecture: Architecture) -> str:
        """File that stores a candidate's scores."""
        name = f"benchmarks-{storage.fingerprint(self.identity())}.json"
        return storage.join(trial_folder(folder, architecture), name)


def benchmark_best(
    task: SearchTask, result: SearchResult, architectures: Sequence[Architecture], benchmarks: Benchmarks, pool: Pool
) -> SearchResult:
    """Run the benchmarks on the winner and the next best by KL, `benchmarks.keep` in all; returns `result` with their scores.

    `architectures` are all candidates of the search: afterwards their weights are deleted. Stored scores are read instead of
    measured; a candidate whose weights are missing is distilled again. A candidate with a failed benchmark is added to the
    failures, with the reason, and stays in the ranking with its other scores. Raises InputError for an argument of the wrong
    type.
    """
    from minitron_search.pool import Pool  # imports Ray Tune

    check_type("task", task, SearchTask)
    check_type("result", result, SearchResult)
    check_types("architectures", architectures, Architecture)
    check_type("benchmarks", benchmarks, Benchmarks)
    check_type("pool", pool, Pool)
    ordered = sorted(result.ranking, key=lambda candidate: (not candidate.winner, candidate.rank))
    best = [candidate.architecture for candidate in ordered[: benchmarks.keep]]
    paths = {architecture: benchmarks.path(task.folder, architecture) for architecture in best}
    failed = pool.single_process().run(
        partial(_benchmark, replace(task, keep_weights=True), benchmarks),
        best,
        lambda architecture: len(_scores(paths[architecture])) == len(benchmarks.tasks),
    )
    task.before_commit()
    StoredTrials(task.folder).drop_weights(architectures)
    ranking = [
        _with_scores(candidate, benchmarks, paths[candidate.architecture])
        if candidate.architecture in paths
        else candidate
        for candidate in result.ranking
    ]
    reasons = {architecture: f"its benchmarks: {reason}" for architecture, reason in failed.items()}
    return replace(result, ranking=ranking, failures={**result.failures, **reasons})


def _with_absolute_path(task: Task) -> Task:
    def absolute(name: str, path: str | None) -> str | None:
        return absolute_path(f"tasks.{task.name}.{name}", path) if path and not path.startswith(PACKAGE) else path

    return replace(task, data=absolute("data", task.data), folder=absolute("folder", task.folder))


def _with_scores(candidate: RankedCandidate, benchmarks: Benchmarks, path: str) -> RankedCandidate:
    scores = _scores(path)
    known = [(task.key, scores[task.key]) for task in benchmarks.tasks if task.key in scores]
    return replace(
        candidate,
        benchmarks=tuple(
            BenchmarkScore(name, score["metric"], score["value"], score["stderr"], Score(**score).settings)
            for name, score in known
        ),
    )


def _benchmark(task: SearchTask, benchmarks: Benchmarks, architecture: Architecture, report: Report) -> None:
    from minitron.evaluation import evaluate  # imports lm-eval
    from minitron_search.trial import run_trial

    run_trial(task, architecture, report)  # trains only if the weights are missing
    folder = storage.fetch(weights(task.folder, architecture))
    model = load_onto(folder, DTYPES[task.materials.dtype], device())
    tokenizer = load_tokenizer(storage.fetch(benchmarks.tokenizer))
    path = benchmarks.path(task.folder, architecture)
    failed: dict[str, Exception] = {}
    known = _scores(path)
    missing = [benchmark for benchmark in benchmarks.tasks if benchmark.key not in known]
    scores = evaluate(
        model,
        tokenizer,
        missing,
        batch_size=benchmarks.batch_rows,
        add_bos=benchmarks.add_bos,
        on_failure=failed.__setitem__,
    )
    task.before_commit()
    storage.write_json(path, known | {name: asdict(score) for name, score in scores.items()})
    if failed:
        reasons = [f"{name}: {one_line(error)}" for name, error in failed.items()]
        raise InputError("; ".join(reasons))  # not retried: the next attempt would fail in the same way


def _scores(path: str) -> dict[str, Any]:
    """A candidate's stored scores by task name, as the values of `minitron.evaluation.Score`."""
    scores: dict[str, Any] = storage.read_json_if_exists(path) or {}
    return scores

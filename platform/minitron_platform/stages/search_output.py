"""Output of the search stage; records that earlier versions wrote are converted when they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from pydantic import model_validator

from minitron.architecture import PRUNABLE, Architecture
from minitron_platform.stages.stage import ArtifactPath, StageOutput
from minitron_search.limits import Limits
from minitron_search.ranking import RankedCandidate
from minitron_search.results import ScoredCandidate, StoppedCandidate
from minitron_search.stability import MeasureStability


@dataclass(frozen=True)
class FailedCandidate:
    """A candidate whose trial or one of whose benchmarks failed, and the reason."""

    architecture: Architecture
    reason: str


class SearchOutput(StageOutput):
    """Result of a search. Fields without a description are those of `minitron_search.SearchResult`."""

    winner: Architecture
    reason: str
    ranking: tuple[RankedCandidate, ...]
    stopped: tuple[StoppedCandidate, ...]
    forward: tuple[ScoredCandidate, ...] | None
    stability: tuple[MeasureStability, ...]
    settled: int | None
    saved: float
    failures: tuple[FailedCandidate, ...]
    benchmarks: tuple[str, ...]
    """Names of the tasks that the best candidates were scored on."""
    serving: Limits
    """Batch and context that the ranking's memory and latency are for."""
    candidates: int
    """Number of all candidates."""
    architectures: tuple[Architecture, ...]
    """Candidates that were distilled or failed, without those that were only scored."""
    trials: ArtifactPath
    """Folder of the trials."""

    @property
    def metrics(self) -> dict[str, str]:
        """Name of the metric of each benchmark that a candidate has a score on."""
        return {score.task: score.metric for candidate in self.ranking for score in candidate.benchmarks}

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_form(cls, outputs: Any) -> Any:
        earlier = isinstance(outputs, dict) and isinstance(outputs.get("failures"), dict)
        return _from_earlier_form(outputs) if earlier else outputs


def _from_earlier_form(outputs: dict[str, Any]) -> dict[str, Any]:
    """The present form of `outputs` of an earlier version, whose rows named an architecture by its display text."""
    winner = Architecture.from_dict(outputs["winner"])
    by_text = {str(a): a for a in map(Architecture.from_dict, outputs["architectures"])}

    def converted(row: dict[str, Any]) -> dict[str, Any]:
        text = row["architecture"]
        architecture = by_text.get(text) or _from_sizes(winner, row, text)
        return {**{name: value for name, value in row.items() if name not in PRUNABLE}, "architecture": architecture}

    forward = outputs["forward"]
    return {
        **outputs,
        "ranking": [_with_benchmarks(converted(row), outputs) for row in outputs["ranking"]],
        "stopped": [converted(row) for row in outputs["stopped"]],
        "forward": None if forward is None else [converted(row) for row in forward],
        "failures": [{"architecture": by_text[text], "reason": reason} for text, reason in outputs["failures"].items()],
    }


def _from_sizes(like: Architecture, row: dict[str, Any], text: str) -> Architecture:
    """The architecture of a row that has its sizes as columns, except the number of experts, which is only in the text."""
    sizes = {name: row[name] for name in PRUNABLE if name in row}
    if experts := re.search(r"(\d+) experts", text):
        sizes["num_experts"] = int(experts[1])
    return replace(like, **sizes)


def _with_benchmarks(row: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """`row` with the scores of its columns as a list of benchmarks."""
    metrics = outputs.get("metrics", {})
    scores = [
        {"task": task, "metric": metrics.get(task, ""), "value": row[task], "stderr": row[f"{task}_stderr"]}
        for task in outputs["benchmarks"]
        if row.get(task) is not None
    ]
    return {**row, "benchmarks": scores}

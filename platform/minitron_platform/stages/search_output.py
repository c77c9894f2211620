"""What a search stage leaves for later stages, the report and the records: its stage.json, checked when it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from pydantic import model_validator

from minitron.architecture import PRUNABLE, Architecture
from minitron_platform.stages.stage import ArtifactPath, StageOutput
from minitron_platform.tracking.restarts import Restart
from minitron_search.limits import Limits
from minitron_search.ranking import RankedCandidate
from minitron_search.results import ScoredCandidate, StoppedCandidate
from minitron_search.stability import MeasureStability


@dataclass(frozen=True)
class FailedCandidate:
    """A candidate that did not finish, or one of whose benchmarks failed, and why."""

    architecture: Architecture
    reason: str


class SearchOutput(StageOutput):
    """`architectures` are the candidates that were distilled or failed, `candidates` counts all of them, `benchmarks` are the
    names of the tasks that the best got, `serving` is what memory and latency are of, `trials` the folder of the trials. The
    rest is as in `minitron_search.SearchResult`."""

    winner: Architecture
    reason: str
    ranking: tuple[RankedCandidate, ...]
    stopped: tuple[StoppedCandidate, ...]
    forward: tuple[ScoredCandidate, ...] | None
    stability: tuple[MeasureStability, ...]
    settled: int | None
    saved: float
    failures: tuple[FailedCandidate, ...]
    restarts: tuple[Restart, ...] = ()
    benchmarks: tuple[str, ...]
    serving: Limits
    candidates: int
    architectures: tuple[Architecture, ...]
    trials: ArtifactPath

    @property
    def metrics(self) -> dict[str, str]:
        """The metric of each benchmark that any candidate has a score on."""
        return {score.task: score.metric for candidate in self.ranking for score in candidate.benchmarks}

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_form(cls, outputs: Any) -> Any:
        earlier = isinstance(outputs, dict) and isinstance(outputs.get("failures"), dict)
        return _from_earlier_form(outputs) if earlier else outputs


def _from_earlier_form(outputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the versions whose rows named an architecture by its display text."""
    winner = Architecture.from_dict(outputs["winner"])
    by_text = {str(a): a for a in map(Architecture.from_dict, outputs["architectures"])}

    def named(row: dict[str, Any]) -> dict[str, Any]:
        text = row["architecture"]
        architecture = by_text.get(text) or _from_sizes(winner, row, text)
        return {**{name: value for name, value in row.items() if name not in PRUNABLE}, "architecture": architecture}

    forward = outputs["forward"]
    return {
        **outputs,
        "ranking": [_with_benchmarks(named(row), outputs) for row in outputs["ranking"]],
        "stopped": [named(row) for row in outputs["stopped"]],
        "forward": None if forward is None else [named(row) for row in forward],
        "failures": [{"architecture": by_text[text], "reason": why} for text, why in outputs["failures"].items()],
    }


def _from_sizes(like: Architecture, row: dict[str, Any], text: str) -> Architecture:
    """The architecture of a row that has sizes as columns, those of experts in the text alone."""
    sizes = {name: row[name] for name in PRUNABLE if name in row}
    if experts := re.search(r"(\d+) experts", text):
        sizes["num_experts"] = int(experts[1])
    return replace(like, **sizes)


def _with_benchmarks(row: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    metrics = outputs.get("metrics", {})
    scores = [
        {"task": task, "metric": metrics.get(task, ""), "value": row[task], "stderr": row[f"{task}_stderr"]}
        for task in outputs["benchmarks"]
        if row.get(task) is not None
    ]
    return {**row, "benchmarks": scores}

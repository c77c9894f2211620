"""Scoring of summaries."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from rouge_score.rouge_scorer import RougeScorer


@lru_cache(maxsize=1)
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L's F measure, from 0 to 1, of a summary's first line against the reference."""
    summary = results[0].strip().split("\n")[0]
    return {"rougeL": float(_scorer().score(document["summary"], summary)["rougeL"].fmeasure)}

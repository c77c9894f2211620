"""The architecture search on Ray Tune: enumerate candidates within a budget, distil each briefly, rank by held-out KL.

Names are loaded on first use, so that enumerating a space does not import Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron.lazy_names import lazy_names

if TYPE_CHECKING:
    from minitron_search.architecture_search import score_all as score_all
    from minitron_search.architecture_search import search as search
    from minitron_search.benchmarks import Benchmarks as Benchmarks
    from minitron_search.benchmarks import benchmark_best as benchmark_best
    from minitron_search.halving import Halving as Halving
    from minitron_search.latency import Latency as Latency
    from minitron_search.limits import Limits as Limits
    from minitron_search.pool import Pool as Pool
    from minitron_search.ranking import RankedCandidate as RankedCandidate
    from minitron_search.results import SearchResult as SearchResult
    from minitron_search.sampling import Space as Space
    from minitron_search.sampling import sample as sample
    from minitron_search.search_task import SearchTask as SearchTask
    from minitron_search.space import candidates as candidates

_PUBLIC = {
    "Benchmarks": ".benchmarks",
    "Halving": ".halving",
    "Latency": ".latency",
    "Limits": ".limits",
    "Pool": ".pool",
    "RankedCandidate": ".ranking",
    "SearchResult": ".results",
    "SearchTask": ".search_task",
    "Space": ".sampling",
    "benchmark_best": ".benchmarks",
    "candidates": ".space",
    "sample": ".sampling",
    "score_all": ".architecture_search",
    "search": ".architecture_search",
}

__all__ = [*_PUBLIC]


__getattr__ = lazy_names(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return sorted(__all__)

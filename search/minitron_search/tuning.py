"""The former home of `search` and `score_all`, kept for programs that import them from here."""

from minitron_search.architecture_search import score_all, search

__all__ = ["score_all", "search"]

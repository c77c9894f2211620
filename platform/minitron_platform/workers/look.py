"""What a run does every few seconds while the cluster works for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from minitron_search.nodes import Node


class Look(Protocol):
    """Looks at the cluster, and may raise to end the wait."""

    def __call__(self, tasks: Sequence[Node] = (), /) -> None:
        """tasks: what tasks of Ray have requested without having begun; other requests Ray itself knows."""


def no_look(tasks: Sequence[Node] = (), /) -> None:
    """Looks at nothing."""

"""When a group of workers may be restarted without losing work. Imports nothing: actors that start with every run use it."""

from __future__ import annotations


class CommittedCheckpoints:
    """Knows, as an actor or in one, whether a checkpoint was committed since Ray Train's controller asked."""

    def __init__(self) -> None:
        self.nothing_to_lose = False

    def resumable(self) -> None:
        """A restart would lose nothing now."""
        self.nothing_to_lose = True

    def may_resize(self, first: bool) -> bool:
        """Whether the group may be restarted with another number of workers now: just after a checkpoint. first: whether the
        controller wants that only now, so that an earlier checkpoint does not count."""
        saved = self.nothing_to_lose and not first
        self.nothing_to_lose = False
        return saved

"""Failures of workers, as the user sees them and as they are stored."""

from __future__ import annotations

from rich.markup import escape

from minitron_platform.console import Console
from minitron_platform.tracking.restarts import Restart, failed_text, left_text, now
from minitron_platform.workers.worker import WorkersFailed, WorkerStarted


class WorkerFailures:
    """Follows the workers of one call, which may fail `max_failures` times."""

    def __init__(self, console: Console, max_failures: int) -> None:
        self.console = console
        self.left = max_failures
        self.nodes: dict[int, str] = {}  # by rank, of the workers that have started

    def event(self, event: object) -> Restart | None:
        """Handle an event of work that has no steps; returns the failure that it is about, if any."""
        match event:
            case WorkerStarted():
                self.started(event)
            case WorkersFailed():
                self.console.status("restarting workers")
                return self.failed(event)
        return None

    def started(self, event: WorkerStarted) -> None:
        """Note on which node a worker runs."""
        self.nodes[event.rank] = event.node

    def failed(self, event: WorkersFailed) -> Restart:
        """Print what has failed where, and what follows; returns it."""
        self.left -= event.counts
        node = ", ".join(dict.fromkeys(self.nodes[rank] for rank in event.ranks if rank in self.nodes))
        self.nodes.clear()
        if event.restarted:
            consequence = f"restarting, {left_text(self.left)}"
        else:
            consequence = "no restarts left" if self.left < 0 else "not restarted, because it would fail again"
        self.console.say(f"  [yellow]failed[/]  {escape(failed_text(event.who, node, event.reason))}; {consequence}")
        return Restart(now(), event.who, node, event.reason, step=None, left=self.left, again=event.restarted)

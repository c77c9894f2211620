"""One training, as the user sees it and as its record keeps it: progress, and workers that failed and were restarted."""

from __future__ import annotations

from rich.markup import escape

from minitron.errors import StorageError
from minitron_platform.console import Console, seconds
from minitron_platform.tracking.restarts import (
    Restart,
    failed_text,
    left_text,
    now,
    read_restarts,
    record_restart,
    write_restarts,
)
from minitron_platform.tracking.spool import RunLog
from minitron_platform.training.events import Event, Measured, Resumed, Tagged, WorkersFailed, WorkerStarted

RESTARTS = "restarts.json"  # beside what a stage trains


class TrainingView:
    """Takes the events of a training of `steps` steps that may fail `max_failures` times.

    Restarts are kept in the file `restarts`, beside the checkpoints, those of earlier runs of the same training included.
    """

    def __init__(self, console: Console, log: RunLog, steps: int, *, restarts: str, max_failures: int) -> None:
        self.console, self.log, self.steps, self.path = console, log, steps, restarts
        self.restarts = read_restarts(restarts)
        self.left = max_failures
        self.nodes: dict[int, str] = {}
        self.failed: Restart | None = None  # not resumed yet
        self.latest = "starting workers"
        self.running = False

    def text(self) -> str:
        """The newest metrics as one line."""
        return self.latest

    def event(self, event: Event) -> None:
        match event:
            case WorkerStarted():
                self.nodes[event.rank] = event.node
            case Resumed():
                self._resumed(event.step)
            case Measured():
                self.log.metrics(event.values, step=event.step)
                if "tokens_per_second" in event.values:
                    self._first_step()
                    self.latest = self._progress(event.values, event.step)
            case Tagged():
                self.log.tags(event.values)
            case WorkersFailed():
                self._failed(event)

    def _first_step(self) -> None:
        if not self.running:
            self.running = True
            self.console.say(f"  first step after {seconds(self.console.elapsed())}")

    def _failed(self, event: WorkersFailed) -> None:
        if self.failed:
            self._keep(self.failed)
        self.left -= 1
        what = f"worker{'s' if len(event.ranks) > 1 else ''} {', '.join(map(str, event.ranks))}"
        node = ", ".join(dict.fromkeys(self.nodes[rank] for rank in event.ranks if rank in self.nodes))
        self.nodes.clear()
        self.failed = Restart(now(), what, node, event.reason, step=None, left=self.left)
        then = f"restarting, {left_text(self.left)}" if self.left >= 0 else "no restarts left"
        self.console.say(f"  [yellow]failed[/]  {escape(failed_text(what, node, event.reason))}; {then}")
        self.latest = "restarting workers"

    def _resumed(self, step: int) -> None:
        if self.failed:
            restart = Restart(**{**vars(self.failed), "step": step})
            self.failed = None
            self._keep(restart)
        if step:
            self.console.say(f"  resumed from step {step}")

    def _keep(self, restart: Restart) -> None:
        self.restarts.append(restart)
        record_restart(self.log, len(self.restarts), restart)
        try:
            write_restarts(self.path, self.restarts)
        except StorageError as error:
            self.console.say(f"  [yellow]restart not kept for the report[/]: {escape(error.problem)}")

    def _progress(self, values: dict[str, float], step: int) -> str:
        per_step = values["tokens"] / step / values["tokens_per_second"]
        loss = f"KL {values['train_kl']:.3f}" if "train_kl" in values else f"loss {values['train_loss']:.3f}"
        return (
            f"step {step}/{self.steps} · {loss} · {values['tokens_per_second']:.0f} tokens/s · "
            f"{seconds(per_step * (self.steps - step))} left"
        )

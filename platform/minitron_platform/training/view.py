"""Progress and restarts of a training, in the terminal and in its record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rich.markup import escape

from minitron_platform.console import Console, seconds
from minitron_platform.tracking.restarts import Restart, Restarts
from minitron_platform.tracking.spool import RunLog
from minitron_platform.training.events import Alarm, Event, Measured, Resumed, Tagged
from minitron_platform.workers.failures import WorkerFailures
from minitron_platform.workers.worker import WorkersFailed, WorkerStarted


class TrainingView:
    """Handles the events of a training of `steps` steps whose workers may fail `max_failures` times.

    restarts: file of all restarts of the training, including those of earlier runs. before_commit: called before it is
    written, see `Worker.before_commit`.
    """

    def __init__(
        self,
        console: Console,
        log: RunLog,
        steps: int,
        *,
        restarts: str,
        max_failures: int,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.console = console
        self.log = log
        self.steps = steps
        self.restarts = Restarts(log, restarts, before_commit=before_commit, say=console.say)
        self.failures = WorkerFailures(console, max_failures)
        self.unresumed: Restart | None = None  # the last failure, until the workers have resumed
        self.latest = "starting workers"
        self.running = False

    def text(self) -> str:
        """The status line: the latest metrics."""
        return self.latest

    def event(self, event: Event) -> None:
        """Handle an event of the training."""
        match event:
            case WorkerStarted():
                self.failures.started(event)
            case Resumed():
                self._resumed(event.step)
            case Measured():
                self.log.metrics(event.values, step=event.step)
                if "tokens_per_second" in event.values:
                    self._report_first_step()
                    self.latest = self._progress(event.values, event.step)
                else:
                    self.log.spool.hurry()  # a held-out loss or a benchmark; the curve has the rest
            case Tagged():
                self.log.tags(event.values)
            case Alarm():
                self.console.say(f"  [yellow]alarm[/]  {escape(event.text)}")
                self.log.tags({f"minitron.alarm.{event.name}": event.text})
            case WorkersFailed():
                self._failed(event)

    def _report_first_step(self) -> None:
        if not self.running:
            self.running = True
            self.console.say(f"  first step after {seconds(self.console.elapsed())}")

    def _failed(self, event: WorkersFailed) -> None:
        self.unresumed = replace(self.failures.failed(event), again=False)  # until it has resumed
        self.latest = "restarting workers"
        self.restarts.add(self.unresumed)

    def _resumed(self, step: int) -> None:
        if self.unresumed:
            self.restarts.replace_latest(replace(self.unresumed, step=step))
            self.unresumed = None
        if step:
            nodes = self.failures.nodes
            workers = f", {len(nodes)} worker{'s' if len(nodes) > 1 else ''}" if nodes else ""
            self.console.say(f"  resumed from step {step}{workers}")

    def _progress(self, values: dict[str, float], step: int) -> str:
        seconds_per_step = values["tokens"] / step / values["tokens_per_second"]
        loss = f"KL {values['train_kl']:.3f}" if "train_kl" in values else f"loss {values['train_loss']:.3f}"
        return (
            f"step {step}/{self.steps} · {loss} · {values['tokens_per_second']:.0f} tokens/s · "
            f"{seconds(seconds_per_step * (self.steps - step))} left"
        )

"""The trials of a search: their progress in the terminal, and their records for MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.markup import escape

from minitron import storage
from minitron.architecture import Architecture, axes_that_differ
from minitron_platform.console import seconds
from minitron_platform.stages.context import Context
from minitron_platform.stages.search_output import SearchOutput
from minitron_platform.stages.trial_restarts import TrialRestarts
from minitron_platform.tracking.events import BENCHMARK_TAG, STATE_TAG, TRAINING
from minitron_platform.tracking.restarts import Restart, now, record_restart
from minitron_platform.tracking.spool import RunLog
from minitron_search.events import (
    Event,
    Failed,
    Finished,
    Leaving,
    Paused,
    Progress,
    Retried,
    RungReached,
    Scored,
    Started,
    Undistilled,
)
from minitron_search.limits import LATENCIES
from minitron_search.ranking import RankedCandidate
from minitron_search.results import StoppedCandidate
from minitron_search.search_task import SearchTask
from minitron_search.stored_trials import StoredTrials
from minitron_search.trial_store import TrialResult, checkpoints, trial_key

MAX_SHOWN = 4  # trials in the status line


def record_trials(context: Context, output: SearchOutput) -> None:
    """Complete the record of every trial of a search with its result, or with the rung at which it was stopped."""
    failures = {candidate.architecture: candidate.reason for candidate in output.failures}
    stopped = {candidate.architecture: candidate for candidate in output.stopped}
    ranked = {candidate.architecture: candidate for candidate in output.ranking}
    results = StoredTrials(output.trials).results(output.architectures)
    for architecture in output.architectures:
        log = _start_record(context, architecture)
        if architecture in failures:
            log.tags({"minitron.failure": failures[architecture]})
            log.end("FAILED")
        elif architecture in stopped:
            _record_stopped(log, stopped[architecture], _step_tokens(context))
            log.end("FINISHED")
        elif result := results.get(architecture):
            _record_result(log, result, ranked.get(architecture), _step_tokens(context))
            log.end("FINISHED")
        else:
            log.end("FAILED")


def _record_stopped(log: RunLog, candidate: StoppedCandidate, step_tokens: int) -> None:
    log.params(_params(candidate.architecture))
    log.metrics({"heldout_kl": candidate.kl, "tokens": candidate.step * step_tokens}, step=candidate.step)
    log.metrics({"heldout_kl_undistilled": candidate.kl_undistilled, "tokens": 0}, step=0)
    log.tags({STATE_TAG: "stopped", "minitron.stopped_at_step": candidate.step})


def _record_result(log: RunLog, result: TrialResult, ranked: RankedCandidate | None, step_tokens: int) -> None:
    log.params(_params(result.architecture))
    for step, kl in result.rung_kl.items():
        log.metrics({"heldout_kl": kl, "tokens": step * step_tokens}, step=step)
    metrics = {
        "heldout_kl": result.kl,
        "heldout_loss": result.loss,
        "top1_agreement": result.top1_agreement,
        "heldout_kl_undistilled": result.kl_undistilled,
        "tokens": result.tokens,
    }
    for name in LATENCIES if ranked is not None else ():
        if (milliseconds := getattr(ranked, name)) is not None:
            metrics[name] = milliseconds
    for score in ranked.benchmarks if ranked is not None else ():
        # an earlier version did not store the name of the metric
        name = f"{score.task}.{score.metric}" if score.metric else score.task
        metrics[name] = score.value
        if score.stderr is not None:
            metrics[f"{name}_stderr"] = score.stderr
        if score.measured_on:
            log.tags({f"{BENCHMARK_TAG}{score.task}": f"{score.metric}, {score.measured_on}"})
    log.metrics(metrics, step=result.steps)


def _params(architecture: Architecture) -> dict[str, int]:
    return {**architecture.sizes, "parameters": architecture.num_parameters}


def _start_record(context: Context, architecture: Architecture) -> RunLog:
    log = context.log(f"trial-{trial_key(architecture)}")
    log.start(architecture.label(), parent=context.log("search").key, tags={"minitron.kind": "trial"})
    return log


def _step_tokens(context: Context) -> int:
    """Number of tokens in a training step of a trial."""
    return context.recipe.search.training.batch_rows * context.recipe.data.seq_length


class TrialsView:
    """Turns the events of trials into a status line, a printed line per finished trial, and metrics in their records.

    scoring: whether all `candidates` are scored before training. to_end: number of candidates that are distilled to the end.
    planned: training steps of all candidates together.
    """

    def __init__(
        self,
        context: Context,
        task: SearchTask,
        candidates: Sequence[Architecture],
        *,
        scoring: bool,
        to_end: int,
        planned: int,
    ) -> None:
        self.context = context
        self.console = context.console
        self.candidates = candidates
        self.axes = axes_that_differ(candidates)
        self.rungs = task.rungs
        self.scoring = scoring
        self.to_end = to_end
        self.planned = planned
        self.steps = task.config.steps
        self.step_tokens = _step_tokens(context)
        self.folder = task.folder
        self.restarts = TrialRestarts(task.folder, before_commit=context.fences.check, say=context.console.say)
        self.active: dict[Architecture, Progress] = {}  # at step 0 until a trial reports progress
        self.logs: dict[Architecture, RunLog] = {}
        self.first_kl: dict[Architecture, float] = {}  # before training
        self.last_kl: dict[Architecture, float] = {}
        # step, KL and candidate of the best measurement: a later step counts more, then a lower KL
        self.best: tuple[int, float, Architecture] | None = None
        stored = StoredTrials(task.folder)
        self.steps_done = _stored_steps(stored, task, candidates)
        self.finished = min(to_end, sum(step == self.steps for step in self.steps_done.values()))
        self.scored = len(stored.forward(candidates)) if scoring else 0
        # time of the first progress of this process, and the steps that were done before it
        self.first_progress: tuple[float, int] | None = None
        self.console.status(self._status)

    def event(self, architecture: Architecture, event: Event) -> None:
        """Handle an event of a candidate's trial."""
        if isinstance(event, Scored):
            self.scored += 1
            self._measured(architecture, 0, event.kl)
            return
        if architecture not in self.logs:
            self.logs[architecture] = _start_record(self.context, architecture)
        log = self.logs[architecture]
        match event:
            case Started():
                self.active[architecture] = Progress(0, {})
                log.tags({STATE_TAG: TRAINING})
            case Undistilled():
                self.first_kl[architecture] = event.kl
            case Progress():
                self._progressed(architecture, event)
                self._log_curve(log, event.step, event.metrics)
            case RungReached():
                self._advance(architecture, event.step)
                self._log_curve(log, event.step, {"heldout_kl": event.kl})
                self._measured(architecture, event.step, event.kl)
            case Leaving():
                self.console.say(
                    f"  {architecture}: its node is about to be taken away; step {event.step}/{self.steps} is saved, from "
                    "which it can go on"
                )
            case Paused():
                self.active.pop(architecture, None)
                log.tags({STATE_TAG: f"paused at step {event.step}"})
                kl = self.last_kl.get(architecture)
                measured = "" if kl is None else f"  held-out KL {kl:.3f}"
                self.console.say(f"  step {event.step}/{self.steps}  {architecture}{measured}")
            case Finished():
                log.tags({STATE_TAG: "finished"})
                self._finished(architecture, event)
            case Retried():
                self._retried(architecture, event)
                self._store_traceback(architecture, event.trace)
            case Failed():
                self.active.pop(architecture, None)
                self.console.say(f"  [yellow]failed[/]  {architecture}: {escape(event.reason)}")
                log.tags({"minitron.failure": event.reason})
                self._store_traceback(architecture, event.trace)
                log.end("FAILED")

    def _finished(self, architecture: Architecture, event: Finished) -> None:
        self.active.pop(architecture, None)
        self.finished += 1
        self._advance(architecture, event.step)
        self._measured(architecture, event.step, event.kl)
        before = f"{self.first_kl[architecture]:.2f} → " if architecture in self.first_kl else ""
        self.console.say(f"  {self.finished}/{self.to_end}  {architecture}  held-out KL {before}{event.kl:.3f}")

    def _retried(self, architecture: Architecture, event: Retried) -> None:
        self.active.pop(architecture, None)
        from minitron.distill.checkpoints import committed_steps  # imports torch's checkpoints

        saved = committed_steps(checkpoints(self.folder, architecture))
        step = saved[-1] if saved else 0
        restart = Restart(now(), str(architecture), event.node, event.reason, step, event.restarts_left)
        record_restart(self.logs[architecture], self.restarts.add(architecture, restart), restart)
        self.console.say(f"  [yellow]restart[/] {escape(str(restart))}")

    def _store_traceback(self, architecture: Architecture, trace: str) -> None:
        """Store the latest traceback of a trial in the run's folder and in MLflow."""
        if trace:
            name = f"trial-{trial_key(architecture)}.txt"
            path = storage.join(self.context.locations.run(self.context.run_key), name)
            self.context.check_fences()
            storage.write_bytes(path, trace.encode())
            self.logs[architecture].artifact(path)

    def _log_curve(self, log: RunLog, step: int, values: Mapping[str, float]) -> None:
        """Log `values` with the number of tokens, so that MLflow can compare trials with different batch sizes."""
        log.metrics({**values, "tokens": step * self.step_tokens}, step=step)

    def _progressed(self, architecture: Architecture, progress: Progress) -> None:
        self.active[architecture] = progress
        if self.first_progress is None:
            self.first_progress = time.monotonic(), sum(self.steps_done.values())
            self.console.say(f"  first step after {seconds(self.console.elapsed())}")
        self._advance(architecture, progress.step)

    def _advance(self, architecture: Architecture, step: int) -> None:
        self.steps_done[architecture] = max(self.steps_done[architecture], step)

    def _measured(self, architecture: Architecture, step: int, kl: float) -> None:
        self.last_kl[architecture] = kl
        if self.best is None or (-step, kl) < (-self.best[0], self.best[1]):
            self.best = step, kl, architecture

    def _status(self) -> str:
        """The status line."""
        if self.scoring and not self.logs:
            parts = [f"{self.scored}/{len(self.candidates)} candidates scored undistilled"]
        else:
            parts = [f"{self.finished}/{self.to_end} candidates"]
        next_rung = self._next_rung()
        if next_rung:
            parts.append(f"next rung at step {next_rung}/{self.steps}")
        if self.best:
            step, kl, architecture = self.best
            parts.append(f"best so far {architecture.label(self.axes)} KL {kl:.3f} at step {step}")
        active = list(self.active.items())
        speed = sum(progress.metrics.get("tokens_per_second", 0) for _, progress in active)
        if speed:
            parts.append(f"{speed:,.0f} tokens/s")
        seconds_left = self._seconds_left()
        if seconds_left:
            parts.append(f"about {seconds(seconds_left)} left")
        for architecture, progress in active[:MAX_SHOWN]:
            loss = f" loss {progress.metrics['train_loss']:.2f}" if progress.metrics else ""
            parts.append(f"{architecture.label(self.axes)} {progress.step}/{self.steps}{loss}")
        if not active and not self.scored:
            parts.append("starting workers")
        return " · ".join(parts)

    def _next_rung(self) -> int | None:
        """The next rung of the least advanced trial."""
        if not self.active:
            return None
        fewest_steps = min(self.steps_done[architecture] for architecture in self.active)
        return next((rung for rung in self.rungs if rung > fewest_steps), None)

    def _seconds_left(self) -> float | None:
        """Time for the remaining steps at the speed of this process so far; None before its second progress."""
        if self.first_progress is None:
            return None
        start_time, start_steps = self.first_progress
        steps = sum(self.steps_done.values())
        if steps <= start_steps:
            return None
        seconds_per_step = (time.monotonic() - start_time) / (steps - start_steps)
        return seconds_per_step * max(0, self.planned - steps)


def _stored_steps(
    stored: StoredTrials, task: SearchTask, candidates: Sequence[Architecture]
) -> dict[Architecture, int]:
    """Steps of the candidates' trials that earlier runs finished."""
    steps = dict.fromkeys(candidates, 0)
    for rung in task.rungs:
        steps |= dict.fromkeys(stored.rung_kl(candidates, rung), rung)
    return steps | dict.fromkeys(stored.results(candidates, task.rungs), task.config.steps)

"""The trials of a search, as the user sees them and as MLflow keeps them."""

from __future__ import annotations

import time
from typing import Any

from rich.markup import escape

from minitron import storage
from minitron.architecture import Architecture
from minitron.distill.checkpoints import committed_steps
from minitron_platform.console import seconds
from minitron_platform.stages.context import Context
from minitron_platform.tracking.restarts import Restart, now, record_restart
from minitron_platform.tracking.spool import RunLog
from minitron_search.trial import SHAPE, SearchTask, finished_result, rung_result, trial_key, trial_result, undistilled

CURVES = ("train_loss", "train_kl", "learning_rate", "grad_norm", "tokens_per_second")
SHOWN = 4  # trials on the live line


def record_trials(context: Context, outputs: dict[str, Any]) -> None:
    """Close the record of every trial of a search stage with its result, or with the rung that stopped it."""
    stopped = {row["architecture"]: row for row in outputs["stopped"]}
    tokens = _step_tokens(context)
    ranked = {row["architecture"]: row for row in outputs["ranking"]}
    for architecture in [Architecture.from_dict(values) for values in outputs["architectures"]]:
        log = _open(context, architecture)
        if why := outputs["failures"].get(str(architecture)):
            log.tags({"minitron.failure": why})
            log.end("FAILED")
            continue
        if row := stopped.get(str(architecture)):
            log.params({name: row[name] for name in (*SHAPE, "parameters")})
            log.metrics({"heldout_kl": row["kl"], "tokens": row["step"] * tokens}, step=row["step"])
            log.metrics({"heldout_kl_undistilled": row["kl_undistilled"], "tokens": 0}, step=0)
            log.tags({"minitron.stopped_at_step": row["step"]})
            log.end("FINISHED")
            continue
        result = trial_result(outputs["trials"], architecture)
        if result is None:
            log.end("FAILED")
            continue
        log.params({name: result["architecture"][name] for name in SHAPE} | {"parameters": result["parameters"]})
        for rung in result["rungs"]:
            log.metrics({"heldout_kl": rung["kl"], "tokens": rung["step"] * tokens}, step=rung["step"])
        log.metrics(
            {
                "heldout_kl": result["kl"],
                "heldout_loss": result["loss"],
                "top1_agreement": result["top1_agreement"],
                "heldout_kl_undistilled": result["kl_undistilled"],
                "tokens": result["tokens"],
            },
            step=result["config"]["steps"],
        )
        row = ranked.get(str(architecture), {})
        more = {"latency_ms": "latency_ms"}  # of the ranking's columns, by their names in MLflow
        for task in outputs["benchmarks"]:
            name = f"{task}.{outputs['metrics'][task]}" if task in outputs.get("metrics", {}) else task
            more |= {task: name, f"{task}_stderr": f"{name}_stderr"}
        figures = {name: row[column] for column, name in more.items() if row.get(column) is not None}
        log.metrics(figures, step=result["config"]["steps"])
        log.end("FINISHED")


def _open(context: Context, architecture: Architecture) -> RunLog:
    log = context.log(f"trial-{trial_key(architecture)}")
    log.start(str(architecture), parent=context.log("search").key, tags={"minitron.kind": "trial"})
    return log


def _step_tokens(context: Context) -> int:
    """Tokens of one step of a trial."""
    return context.recipe.search.training.batch_rows * context.recipe.data.seq_length


class TrialsView:
    """Turns what trials report into the live line, a line per finished trial, and metrics. `scoring` says that all of
    `found` are scored first; `to_end` is how many are distilled to the end, `planned` how many training steps are done in
    all."""

    def __init__(
        self,
        context: Context,
        task: SearchTask,
        found: list[Architecture],
        *,
        scoring: bool,
        to_end: int,
        planned: int,
    ) -> None:
        self.context, self.console = context, context.console
        self.by_key = {trial_key(a): a for a in found}
        self.rungs, self.scoring, self.to_end, self.planned = task.rungs, scoring, to_end, planned
        self.steps, self.step_tokens = task.config.steps, _step_tokens(context)
        self.folder, self.restarts = task.folder, list[Restart]()
        self.active: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, RunLog] = {}
        self.first_kl: dict[str, float] = {}
        self.last_kl: dict[str, float] = {}
        self.best: tuple[int, float, str] | None = (
            None  # less the step, KL, candidate: the furthest measured, then lowest
        )
        self.position = {trial_key(a): _steps_done(task, a) for a in found}
        self.finished = min(to_end, sum(step == self.steps for step in self.position.values()))
        self.scored = sum(undistilled(task.folder, a) is not None for a in found) if scoring else 0
        self.before: tuple[float, int] | None = None  # when the first step was reported, and the steps done by then
        self.console.status(self._status)

    def event(self, key: str, numbers: dict[str, Any]) -> None:
        """A report of one trial: see `minitron_search.trial.run_trial`; or {"failed": reason} or {"retried": reason}, both with
        the "trace" of what was raised, and retried with the "node" and "restarts_left"."""
        if "scored" in numbers:
            self.scored += 1
            self._measured(key, 0, numbers["scored"])
            return
        if key not in self.logs:
            self.logs[key] = _open(self.context, self.by_key[key])
        log, name = self.logs[key], str(self.by_key[key])
        if "steps" in numbers:
            self._moved(key, numbers)
        if "train_loss" in numbers:
            self._curve(log, int(numbers["step"]), {k: numbers[k] for k in CURVES if k in numbers})
        elif "failed" in numbers:
            self.active.pop(key, None)
            self.console.say(f"  [yellow]failed[/]  {name}: {escape(str(numbers['failed']))}")
            log.tags({"minitron.failure": numbers["failed"]})
            self._keep_trace(key, numbers)
            log.end("FAILED")
        elif "retried" in numbers:
            self.active.pop(key, None)
            self._retried(key, name, numbers)
            self._keep_trace(key, numbers)
        elif "rung" in numbers:
            self._curve(log, int(numbers["rung"]), {"heldout_kl": numbers["kl"]})
            self._measured(key, int(numbers["rung"]), numbers["kl"])
        elif "paused" in numbers:
            self.active.pop(key, None)
            self.console.say(f"  step {numbers['paused']}/{self.steps}  {name}  held-out KL {self.last_kl[key]:.3f}")
        elif "kl" in numbers and numbers["step"] == 0:
            self.first_kl[key] = numbers["kl"]
        elif "kl" in numbers:
            self.active.pop(key, None)
            self.finished += 1
            self._measured(key, self.steps, numbers["kl"])
            before = f"{self.first_kl[key]:.2f} → " if key in self.first_kl else ""
            self.console.say(f"  {self.finished}/{self.to_end}  {name}  held-out KL {before}{numbers['kl']:.3f}")

    def _retried(self, key: str, name: str, numbers: dict[str, Any]) -> None:
        saved = committed_steps(storage.join(self.folder, key, "checkpoints"))
        step = saved[-1] if saved else 0
        restart = Restart(now(), name, numbers["node"], numbers["retried"], step, numbers["restarts_left"])
        self.restarts.append(restart)
        number = sum(other.what == name for other in self.restarts)
        record_restart(self.logs[key], number, restart)
        self.console.say(f"  [yellow]again[/]   {escape(str(restart))}")

    def _keep_trace(self, key: str, numbers: dict[str, Any]) -> None:
        """The newest, beside the run's record and in MLflow."""
        if "trace" in numbers:
            path = storage.join(self.context.places.local_run(self.context.run_key), f"trial-{key}.txt")
            storage.write_bytes(path, numbers["trace"].encode())
            self.logs[key].artifact(path)

    def _curve(self, log: RunLog, step: int, values: dict[str, float]) -> None:
        """With the tokens so far, against which MLflow draws trials of other batch sizes."""
        log.metrics({**values, "tokens": step * self.step_tokens}, step=step)

    def _moved(self, key: str, numbers: dict[str, Any]) -> None:
        self.active[key] = numbers
        if self.before is None and "train_loss" in numbers:
            self.before = time.monotonic(), sum(self.position.values())
            self.console.say(f"  first step after {seconds(self.console.elapsed())}")
        self.position[key] = max(self.position[key], int(numbers["step"]))

    def _measured(self, key: str, step: int, kl: float) -> None:
        self.last_kl[key] = kl
        self.best = min(self.best or (-step, kl, key), (-step, kl, key))

    def _status(self) -> str:
        if self.scoring and not self.logs:
            parts = [f"{self.scored}/{len(self.by_key)} candidates scored undistilled"]
        else:
            parts = [f"{self.finished}/{self.to_end} candidates"]
        if next_rung := self._next_rung():
            parts.append(f"next rung at step {next_rung}/{self.steps}")
        if self.best:
            step, kl, key = self.best
            parts.append(f"best so far {_short(self.by_key[key])} KL {kl:.3f} at step {-step}")
        if speed := sum(numbers.get("tokens_per_second", 0) for numbers in list(self.active.values())):
            parts.append(f"{speed:,.0f} tokens/s")
        if left := self._seconds_left():
            parts.append(f"about {seconds(left)} left")
        shown = [
            f"{_short(self.by_key[key])} {numbers['step']}/{numbers['steps']}"
            + (f" loss {numbers['train_loss']:.2f}" if "train_loss" in numbers else "")
            for key, numbers in list(self.active.items())[:SHOWN]
        ]
        return " · ".join([*parts, *(shown or ([] if self.scored else ["starting workers"]))])

    def _next_rung(self) -> int | None:
        """The next rung of the trial that has come least far."""
        if not self.active:
            return None
        least = min(self.position[key] for key in list(self.active))
        return next((rung for rung in self.rungs if rung > least), None)

    def _seconds_left(self) -> float | None:
        """At the pace of this process so far."""
        if self.before is None:
            return None
        since, first = self.before
        done = sum(self.position.values())
        return (time.monotonic() - since) / (done - first) * max(0, self.planned - done) if done > first else None


def _steps_done(task: SearchTask, architecture: Architecture) -> int:
    if finished_result(task, architecture) is not None:
        return task.config.steps
    reached = (rung for rung in task.rungs if rung_result(task.folder, architecture, rung) is not None)
    return max(reached, default=0)


def _short(architecture: Architecture) -> str:
    return f"{architecture.num_layers}L·{architecture.hidden_size}"

"""Metrics for Prometheus, which Ray exports: what a run does now, for dashboards and alerts. MLflow has the whole history.

They are read from the events of the run's records, so they are those of MLflow under names that are fixed here. Ray puts
`ray_` before each name, and its agent on the driver's node serves them at the port `MetricsExportPort` of `ray.nodes()`.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from minitron_platform.tracking.events import STATE_TAG, TRAINING, Event

PREFIX = "minitron_"
REPEAT_SECONDS = 1.0  # Ray collects values every 10 s by default
TRIAL_SECONDS = 120.0  # that the values of a trial are exported after its end
TAGS = ("run", "part")
# Metrics of a part of a run (a stage, or a trial), by their name in the records; the others of the records are not exported.
OF_PARTS = {
    "train_loss": "Whole objective of the training at the last reported step.",
    "train_kl": "Divergence from the teacher on the rows of the last reported step, nats per token.",
    "heldout_kl": "Divergence from the teacher on the held-out rows, nats per token.",
    "heldout_loss": "Loss on the held-out rows, nats per token.",
    "learning_rate": "Learning rate of the last reported step.",
    "grad_norm": "L2 norm of the gradient of the last reported step.",
    "tokens": "Tokens that the training has read.",
    "tokens_per_second": "Tokens that the training reads in a second, 0 once it has ended.",
    "flop_utilisation": "Model FLOPs as a share of the measured peak, 0 once the training has ended.",
    "skipped_steps": "Steps that were skipped because their loss or gradient was not finite.",
    "restarts": "Restarts of the training after a failure.",
}
SPEEDS = ("tokens_per_second", "flop_utilisation")
LAST_STEP = "last_step_time_seconds"
TRAININGS = ("distill", "correct")  # the stages that train; a trial says in its STATE_TAG whether it does
STEP_SECONDS = "seconds_"  # begins the records' names of the parts of a step
OTHERS = {
    "step": ("Last reported step of the training.", TAGS),
    "step_part_seconds": ("Seconds of a step by what they were spent on.", (*TAGS, "what")),
    LAST_STEP: ("Unix time at which the training began or last reported a step.", TAGS),
    "running": ("1 while the run, the stage or the trial runs, 0 afterwards.", (*TAGS, "kind")),
    "parts": ("Stages and trials of the run by their state.", ("run", "kind", "state")),
    "stage_seconds": ("Time that a finished stage has taken.", TAGS),
    "unsent_records": ("Records that MLflow does not have yet.", ("run",)),
}
METRICS = {**{name: (text, TAGS) for name, text in OF_PARTS.items()}, **OTHERS}
"""Description and tags of every metric, by its name without `ray_minitron_`."""


class Monitor:
    """Exports the metrics of the run `run` inside the block, while Ray runs in this process. Safe to call from several threads.

    Ray forgets a value when it has exported it once, so a thread sets all values again and again. A driver that is connected
    by ray:// has no part in the cluster that could export anything.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._kinds: dict[str, str] = {}  # of the run ("") and its parts
        self._states: dict[str, str] = {}  # of the parts
        self._counts = Counter[tuple[str, str]]()  # of the parts, by kind and state
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._ended_trials: dict[str, float] = {}  # when, by time.monotonic()
        self._gauges: dict[str, Any] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="minitron-metrics", daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._export()

    def event(self, event: Event) -> None:
        """Take notice of an event of the run's records."""
        part = event["key"].removeprefix(self.run).removeprefix(".")
        with self._lock:
            match event["event"]:
                case "start":
                    self._kinds[part] = event["tags"].get("minitron.kind", "part")
                    self._state(part, "running")
                    if part:
                        self._set("restarts", 0, part=part)  # alerts compare with what was before
                        if part.rpartition(".")[2] in TRAININGS:
                            self._set(LAST_STEP, time.time(), part=part)
                case "tags" if STATE_TAG in event["values"]:
                    if event["values"][STATE_TAG] == TRAINING:
                        self._set(LAST_STEP, time.time(), part=part)
                    else:  # it waits for other trials, or for the end of the search
                        self._stands(part)
                        self._values.pop((LAST_STEP, (("part", part),)), None)
                case "end":
                    self._state(part, event["status"].lower())
                    self._stands(part)
                case "metrics" if part:
                    self._metrics(part, event["values"], event["step"])

    def unsent(self, number: int) -> None:
        """Export the number of records that MLflow does not have yet."""
        with self._lock:
            self._set("unsent_records", number)

    def _stands(self, part: str) -> None:
        for name in SPEEDS:
            if (name, (("part", part),)) in self._values:  # it has trained
                self._set(name, 0.0, part=part)

    def _state(self, part: str, state: str) -> None:
        kind = self._kinds.get(part, "part")
        self._set("running", float(state == "running"), part=part, kind=kind)
        if not part:
            return
        if kind == "trial" and state != "running":
            self._ended_trials[part] = time.monotonic()
        before = self._states.get(part)
        if before is not None:
            self._count(kind, before, -1)
        self._count(kind, state, 1)
        self._states[part] = state

    def _count(self, kind: str, state: str, change: int) -> None:
        self._counts[kind, state] += change
        self._set("parts", self._counts[kind, state], kind=kind, state=state)

    def _metrics(self, part: str, values: Mapping[str, float | str], step: int) -> None:
        for name, value in values.items():
            if name in OF_PARTS:
                self._set(name, float(value), part=part)
            elif name.startswith(STEP_SECONDS):
                self._set("step_part_seconds", float(value), part=part, what=name.removeprefix(STEP_SECONDS))
            elif name == "seconds":
                self._set("stage_seconds", float(value), part=part)
        if "tokens_per_second" in values:
            self._set("step", step, part=part)
            self._set(LAST_STEP, time.time(), part=part)

    def _set(self, name: str, value: float, **tags: str) -> None:
        if math.isfinite(value):  # Ray exports no other
            self._values[name, tuple(tags.items())] = value

    def _repeat(self) -> None:
        while not self._closing.wait(REPEAT_SECONDS):
            self._export()

    def _export(self) -> None:
        if not _ray_runs():
            return
        from ray.util.metrics import Gauge

        for (name, found), value in self.values().items():
            if name not in self._gauges:
                text, keys = METRICS[name]
                self._gauges[name] = Gauge(f"{PREFIX}{name}", description=text, tag_keys=keys)
            self._gauges[name].set(value, tags={"run": self.run, **dict(found)})

    def values(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """What is exported now, by name and tags; every value has the tag `run` too."""
        with self._lock:
            self._forget_trials()
            return dict(self._values)

    def _forget_trials(self) -> None:
        """Leave out the trials that have ended a while ago: a search may have thousands."""
        now = time.monotonic()
        old = {trial for trial, ended in self._ended_trials.items() if now - ended > TRIAL_SECONDS}
        if old:
            self._values = {key: value for key, value in self._values.items() if dict(key[1]).get("part") not in old}
            self._ended_trials = {trial: ended for trial, ended in self._ended_trials.items() if trial not in old}


def _ray_runs() -> bool:
    """Whether this process is part of a running Ray. Does not import it: that takes seconds, and some runs need no Ray."""
    ray: Any = sys.modules.get("ray")
    if not hasattr(ray, "is_initialized"):  # not imported, or not completely: another thread is about to
        return False
    return bool(ray.is_initialized() and not ray.util.client.ray.is_connected())

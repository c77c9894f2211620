"""What is to be changed in one MLflow run, gathered from its events, and the requests that do it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from minitron_platform.tracking.events import NAME_LENGTH, Event

# MLflow accepts 1000 metrics, 100 parameters, 100 tags, 1000 of them together and 1 MB in a request.
ENTITIES_PER_CALL = 1000
PARAMS_PER_CALL = 50
TAGS_PER_CALL = 50
PARAM_LENGTH = 6000  # MLflow's limit, in characters
DATASET_NAME_LENGTH = 500  # MLflow's limits
DIGEST_LENGTH = 36
TAG_LENGTH = 8000  # MLflow's limit, in characters


@dataclass(frozen=True)
class Call:
    """The entities of one log_batch request."""

    metrics: list[Any]
    params: list[Any]
    tags: list[Any]

    def __len__(self) -> int:
        return len(self.metrics) + len(self.params) + len(self.tags)

    def halves(self) -> tuple[Call, Call]:
        """Two calls that together have the same entities: the parameters apart, if there are others, else each half of them."""
        if self.params and len(self) > len(self.params):
            return Call(self.metrics, [], self.tags), Call([], self.params, [])
        first, second = Call([], [], []), Call([], [], [])
        for name in ("metrics", "params", "tags"):
            entities = getattr(self, name)
            middle = (len(entities) + 1) // 2 if not len(first) > len(second) else len(entities) // 2
            getattr(first, name).extend(entities[:middle])
            getattr(second, name).extend(entities[middle:])
        return first, second


@dataclass
class Changes:
    """Changes of one run that MLflow does not have yet. Those that it has accepted are removed."""

    key: str
    time_ms: int
    """Time of the first event."""
    events: int = 0
    start: Event | None = None
    """The latest start."""
    end: Event | None = None
    """The end, unless the run has started again after it."""
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    """Name, value, time in milliseconds, step."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[Event] = field(default_factory=list)
    datasets: list[Event] = field(default_factory=list)

    @property
    def parent(self) -> str | None:
        """Key of the parent run; None if these changes do not say it."""
        return None if self.start is None else self.start.get("parent")

    def add(self, event: Event) -> None:
        """Add the next event of the run."""
        self.events += 1
        match event["event"]:
            case "start":
                self.start, self.end = event, None
                self.tags.update(event["tags"])
            case "end":
                self.end = event
            case "tags":
                self.tags.update(event["values"])
            case "params":
                for name, value in event["values"].items():
                    if self.params.setdefault(name, value) != value:
                        self.tags[changed(name)] = value
            case "metrics":
                self._add_metrics(event)
            case "artifact":
                self.artifacts.append(event)
            case "dataset":
                self.datasets.append(event)

    def _add_metrics(self, event: Event) -> None:
        for name, written in event["values"].items():
            value = float(written)
            if math.isinf(value):  # MLflow would store it in SQLite as 1.8e308
                self.tags[f"{name}.nonfinite"] = f"{value} at step {event['step']}"
            else:
                self.metrics.append((name, value, event["t"], event["step"]))

    def call(self) -> Call | None:
        """The next request, as large as MLflow takes it; None if nothing is left for log_batch."""
        from mlflow.entities import Metric, Param, RunTag

        params = [Param(name, value[:PARAM_LENGTH]) for name, value in _first(self.params, PARAMS_PER_CALL)]
        tags = [RunTag(name, value[:TAG_LENGTH]) for name, value in _first(self.tags, TAGS_PER_CALL)]
        room = ENTITIES_PER_CALL - len(params) - len(tags)
        metrics = [Metric(*metric) for metric in self.metrics[:room]]
        call = Call(metrics, params, tags)
        return call if len(call) else None

    def done(self, call: Call) -> None:
        """Remove what `call` has sent."""
        del self.metrics[: len(call.metrics)]
        for param in call.params:
            del self.params[param.key]
        for tag in call.tags:
            del self.tags[tag.key]


def dataset_input(event: Event) -> Any:
    """MLflow's form of a dataset that a run reads."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=event["name"][:DATASET_NAME_LENGTH] or "text",
        digest=event["digest"][:DIGEST_LENGTH],
        source_type=event["source"].split("://")[0] if "://" in event["source"] else "local",
        source=json.dumps({"uri": event["source"]}),
        profile=json.dumps({"tokens": event["tokens"]}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])


def changed(name: str) -> str:
    """The tag for a value of a parameter that has another one already, which MLflow never changes."""
    return f"changed.{name}"[:NAME_LENGTH]


def _first(values: dict[str, str], count: int) -> Iterator[tuple[str, str]]:
    return iter(list(values.items())[:count])

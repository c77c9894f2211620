"""One run of the recipe, during which something is killed at each of some moments."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.kills.moments import Moment, finished_parts, seconds_to_record, without_fingerprints
from benchmarks.kills.nodes import Machines, Node, drain, kill, kill_alone, sends_from
from benchmarks.kills.storage import GatedStorage, wait_for

STUDENT = "/student/model.safetensors"
KILLS = ("worker", "node", "driver", "head", "add")
RUN_SECONDS = 900  # longest wait for the next moment or the end
SEEN_SECONDS = 10  # after which a controller has seen a new node; it looks every two seconds
END_SECONDS = 120  # longest wait for a driver whose cluster is gone


@dataclass
class Cell:
    """What a kill at a moment cost."""

    kill: str
    moment: str
    seconds: float
    """From the moment to the end of its stage."""
    parts: dict[str, int]
    """How often each finished part of the stage was written."""
    note: str = ""


@dataclass
class KilledRun:
    """A run in a bucket of its own. name: of the run."""

    machines: Machines
    storage: GatedStorage
    recipe: Path
    name: str
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bucket = f"{self.name}-{int(time.time())}"
        self.storage.files.mkdir(self.bucket)
        self.steps = self.machines.folder / f"{self.bucket}-steps.jsonl"
        self.log = self.machines.folder / f"{self.bucket}.log"
        self.tracking_uri = f"sqlite:///{self.machines.folder}/mlflow.db"
        self.driver: subprocess.Popen[bytes] | None = None
        self.drivers = 0  # that were started
        self.starts: list[tuple[Moment, str, float, str]] = []

    def end(self) -> None:
        """End the driver if it still runs."""
        self.storage.go_on()
        if self.driver is not None and not self._has_ended():
            self._kill_driver()

    def run(self, kills: Sequence[tuple[Moment, str]]) -> None:
        """Run the recipe to its end; at each of the moments, in order, something is killed, added or announced, or ("none")
        nothing. Raises RuntimeError or TimeoutError if it does not get there."""
        self._start()
        for moment, kind in kills:
            self.storage.hold_next(moment.pattern(self.bucket), stored=moment.stored)
            wait_for(lambda: self.storage.is_holding or self._has_ended(), moment.name, RUN_SECONDS)
            if self._has_ended():
                raise RuntimeError(f"the run ended before {moment.name}: see {self.log}\n{self._tail()}")
            start = time.time()
            note = self._act(kind)
            self.starts.append((moment, kind, start, note))
            print(f"  {kind}, {moment.name}: {time.time() - start:.0f} s {note}", flush=True)
        wait_for(self._has_ended, "the run has ended", RUN_SECONDS)
        if self.driver is None or self.driver.returncode:
            raise RuntimeError(f"the run failed: see {self.log}\n{self._tail()}")

    def cells(self) -> list[Cell]:
        """What the kills cost in the stages that have ended."""
        writes = self.storage.writes(self.bucket)
        return [
            Cell(kind, moment.name, seconds, finished_parts(moment, self.bucket, writes), note)
            for moment, kind, start, note in self.starts
            if (seconds := seconds_to_record(moment, self.bucket, writes, start)) is not None
        ]

    def tensors(self) -> dict[str, str]:
        """SHA-256 of the rows and tensors that the stages stored, by path without fingerprints: some depend on the name
        of the bucket."""
        return dict(self._tensors())

    def keep_student(self, path: Path) -> None:
        """Copy the student's weights to a file, if there are any."""
        for found in self.storage.files.find(self.bucket):
            if found.endswith(STUDENT):
                path.write_bytes(self.storage.files.cat(found))

    def curve(self) -> list[float]:
        """Training loss of each step of the distillation; empty if that has not ended."""
        for found in self.storage.files.find(self.bucket):
            if "/stages/distill/" in found and found.endswith("/curve.json"):
                return list(json.loads(self.storage.files.cat(found))["train_loss"])
        return []

    def points(self) -> dict[str, int]:
        """By metric of the distillation in MLflow, the number of its points; -1 if a step has several."""
        from mlflow import MlflowClient

        client = MlflowClient(self.tracking_uri, self.tracking_uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        counts = {}
        for run in client.search_runs(experiments):
            if "distill" in str(run.info.run_name):
                for name in run.data.metrics:
                    steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
                    counts[name] = len(steps) if len(steps) == len(set(steps)) else -1
        return counts

    def versions(self) -> int:
        """Number of versions that the run has registered in MLflow."""
        from mlflow import MlflowClient

        client = MlflowClient(self.tracking_uri, self.tracking_uri)
        return sum(f"s3://{self.bucket}/" in str(version.source) for version in client.search_model_versions())

    def _tensors(self) -> Iterator[tuple[str, str]]:
        for path in self.storage.files.find(self.bucket):
            name = path.removeprefix(f"{self.bucket}/")
            if name.startswith("stages/") and not name.endswith(
                (".json", ".jsonl", ".md")
            ):  # a model card names the bucket
                yield without_fingerprints(name), hashlib.sha256(self.storage.files.cat(path)).hexdigest()

    def _act(self, kind: str) -> str:
        """Kill, and bring back what the kill took; the held request goes on. Returns a note."""
        machines, note = self.machines, ""
        match kind:
            case "worker":
                _, worker = self._at_work()
                note = worker.cmdline()[0]
                kill_alone(worker)
                self.storage.go_on()
            case "node":
                machines.kill_node(self._at_work()[0])
                self.storage.go_on()
                machines.add_node()
            case "lose":  # as "node", but none takes its place
                machines.kill_node(self._at_work()[0])
                self.storage.go_on()
            case "driver":
                self._kill_driver()
                self.storage.go_on()
                self._start()
            case "head":
                assert machines.head
                assert self.driver
                began = time.monotonic()
                machines.head.kill()
                self.storage.go_on()
                try:
                    wait_for(self._has_ended, "the driver has ended", END_SECONDS)
                    note = (
                        f"the driver ended after {time.monotonic() - began:.0f} s, exit code {self.driver.returncode}"
                    )
                except TimeoutError:
                    note = f"the driver had not ended after {END_SECONDS} s"
                    self._kill_driver()
                machines.kill_all()
                machines.start()
                self._start()
            case "add" | "join":
                machines.add_node()
                if kind == "join":  # the controller of the workers sees the node before this checkpoint is committed
                    time.sleep(SEEN_SECONDS)
                self.storage.go_on()
            case "drain":
                drain(machines, machines.nodes[0])
                self.storage.go_on()
            case _:
                self.storage.go_on()
        return note

    def _at_work(self) -> tuple[Node, psutil.Process]:
        """The worker whose request is held, and its node; the first worker if it is the driver's."""
        workers = [(node, worker) for node in self.machines.nodes for worker in node.workers()]
        port = self.storage.holder_port
        return next((each for each in workers if sends_from(each[1], port)), workers[0])

    def _kill_driver(self) -> None:
        assert self.driver is not None
        kill(self.driver)

    def _start(self) -> None:
        """Submit the run, for the first time or again, each time from another home folder: its machine may be lost too."""
        self.drivers += 1
        command = [
            sys.executable,
            "-m",
            "benchmarks.kills.driver",
            str(self.steps),
            "run",
            str(self.recipe),
            "--upload",
        ]
        command += ["--address", self.machines.address, "--storage", f"s3://{self.bucket}"]
        command += ["--tracking-uri", self.tracking_uri]
        command += [word for override in self.overrides for word in ("--set", override)]
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                command,
                cwd=self.recipe.parent,
                env={**self.machines.environment(f"driver-{self.drivers}"), "COLUMNS": "200"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _has_ended(self) -> bool:
        return self.driver is not None and self.driver.poll() is not None

    def _tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-25:])

    def steps_redone(self) -> dict[str, int]:
        """Number of steps that were reported again, by training or candidate."""
        steps = [tuple(json.loads(line)) for line in self.steps.read_text().splitlines()]
        again = Counter(training for (training, _), count in Counter(steps).items() for _ in range(count - 1))
        return {training.removeprefix(f"s3://{self.bucket}/"): count for training, count in again.items()}

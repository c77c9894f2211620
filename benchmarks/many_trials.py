"""Memory and time of the driver with thousands of trials, which are made up: nothing is trained.

    python -m benchmarks.many_trials [--trials 10000] [--rows 512] [--on-tune 1000]

Every trial has its files (the measurement before training, two rungs, the result) in a folder. The driver lists and reads them,
ranks the candidates, measures the stability of the ranking, and writes the output of the stage and the record of every trial.
Then it takes the events of 64 trials that train at once. At last Ray Tune runs `--on-tune` trials, each of which reports
TUNE_STEPS steps, and the driver takes their events as in a search.
The memory is this process's resident memory beyond what it had before; the time is wall time.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import cloudpickle

from benchmarks.measure import machine, memory_now, peak_memory, restart_peak
from minitron.architecture import Architecture
from minitron.distill import DistillConfig, Losses
from minitron.distill.inputs import DistillInputs
from minitron.pruning.source import PruningSource
from minitron_platform import load_recipe
from minitron_platform.cluster.ray_session import ray_session
from minitron_platform.console import Console
from minitron_platform.locations import resolve_locations
from minitron_platform.stages.context import Context
from minitron_platform.stages.search_output import SearchOutput
from minitron_platform.stages.stage_records import Record, read_record, write_record
from minitron_platform.stages.trial_records import TrialsView, record_trials
from minitron_platform.tracking.spool import Spool
from minitron_platform.workers.workers import Workers
from minitron_search.events import Event, Finished, Progress, Report, Started
from minitron_search.limits import Limits
from minitron_search.pool import Pool
from minitron_search.ranking import rank, reason, winner_of
from minitron_search.search_task import SearchTask
from minitron_search.stability import settled, stability
from minitron_search.stored_trials import StoredTrials
from minitron_search.trial_store import (
    ForwardScore,
    RungResult,
    TrialResult,
    write_forward_score,
    write_result,
    write_rung,
)

RUNGS = (200, 300)
STEPS = 400
SEQ_LENGTH = 4096
AT_ONCE = 64
TUNE_STEPS = 3
METRICS = dict.fromkeys(("train_loss", "train_kl", "learning_rate", "grad_norm", "tokens_per_second"), 1.5)


def architectures(count: int) -> list[Architecture]:
    """Different shapes of about 4B parameters."""
    return [
        Architecture(24 + i % 8, 2048 + 32 * (i // 8 % 64), 6144 + 8 * (i // 512), 32, 8, 128, 128_256, False)
        for i in range(count)
    ]


def write_trials(folder: str, made: list[Architecture], rows: int) -> None:
    """The files of finished trials with random KLs on `rows` held-out rows."""
    draw = random.Random(0)
    row = [draw.random() for _ in range(rows)]
    for architecture in made:
        shift = draw.random() / 10
        per_row = [value + shift + draw.gauss(0, 0.01) for value in row]
        kl = sum(per_row) / rows
        write_forward_score(folder, architecture, ForwardScore(kl + 1, kl + 2))
        for step in RUNGS:
            write_rung(folder, architecture, RungResult(step, kl + 0.1, kl + 1, tuple(per_row)))
        result = TrialResult(
            architecture=architecture,
            parameters=architecture.num_parameters,
            kl_undistilled=kl + 1,
            loss_undistilled=kl + 2,
            rung_kl=dict.fromkeys(RUNGS, kl + 0.1),
            kl=kl,
            loss=kl + 1,
            top1_agreement=0.8,
            per_row_kl=per_row,
            tokens=STEPS * 32 * SEQ_LENGTH,
            config={"steps": STEPS},
            seconds=60.0,
        )
        write_result(folder, result)


class Driver:
    """What the driver of a search does with the files of its trials; each part is measured by `steps`."""

    def __init__(self, folder: Path, made: list[Architecture], on_tune: int) -> None:
        self.storage, self.trials, self.made, self.on_tune = str(folder), str(folder / "trials"), made, on_tune
        self.results: list[TrialResult] = []
        self.output: SearchOutput | None = None

    def steps(self) -> dict[str, Callable[[], Any]]:
        """The parts by name, in their order."""
        return {
            "list and read": self.read,
            "rank, stability": self.rank,
            "write and read the stage's output": self.store,
            "records for MLflow": self.record,
            f"{STEPS * AT_ONCE:,} events of {AT_ONCE} trials at once": self.events,
            f"{self.on_tune:,} trials on Ray Tune": self.tune,
        }

    def read(self) -> None:
        stored = StoredTrials(self.trials)
        for rung in RUNGS:
            stored.rung_kl(self.made, rung)
        self.results = list(stored.results(self.made, RUNGS).values())

    def rank(self) -> None:
        ranking = rank(self.results, SEQ_LENGTH)
        rows = stability(self.results, RUNGS)
        self.output = SearchOutput(
            winner=winner_of(ranking).architecture,
            reason=reason(ranking),
            ranking=tuple(ranking),
            stopped=(),
            forward=None,
            stability=tuple(rows),
            settled=settled(rows),
            saved=0.0,
            failures=(),
            benchmarks=(),
            serving=Limits(context=SEQ_LENGTH),
            candidates=len(self.made),
            architectures=tuple(self.made),
            trials=self.trials,
            summary="made up",
        )

    def store(self) -> None:
        assert self.output is not None
        write_record(self.storage, f"{self.storage}/search", Record(self.output, 1.0, []))
        record = read_record(self.storage, f"{self.storage}/search", SearchOutput)
        assert record is not None
        assert record.output == self.output

    def events(self) -> None:
        """What trials report while they train: every step of each of AT_ONCE, in turn, and their ends."""
        with self._view(self.made[:AT_ONCE], STEPS) as view:
            for architecture in view.candidates:
                view.event(architecture, Started(1))
            for step in range(1, STEPS + 1):
                for architecture in view.candidates:
                    view.event(architecture, Progress(step, METRICS))
            for architecture in view.candidates:
                view.event(architecture, Finished(STEPS, 1.0, 2.0))

    def tune(self) -> None:
        """Trials of Ray Tune that train nothing: their reports and their records."""
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        finished = set[Architecture]()
        with self._view(self.made[: self.on_tune], TUNE_STEPS) as view, ray_session("local"):

            def take(architecture: Architecture, event: Event) -> None:
                view.event(architecture, event)
                if isinstance(event, Finished):
                    finished.add(architecture)

            pool = Pool(f"{self.storage}/tune", on_event=take)
            failures = pool.run(made_up_trial, view.candidates, finished.__contains__)
        assert not failures

    @contextmanager
    def _view(self, candidates: list[Architecture], steps: int) -> Iterator[TrialsView]:
        """What the driver shows and records of trials that train for `steps` steps each."""
        folder = f"{self.storage}/events"
        inputs = DistillInputs(
            teacher="t", teacher_id="t", dtype="bfloat16", rows="r", train_targets="t", heldout_targets="h"
        )
        config = DistillConfig(steps=STEPS, batch_rows=32, peak_lr=1e-4, min_lr=1e-5, warmup_steps=1)
        task = SearchTask(inputs, PruningSource("b", "s", "bfloat16"), config, Losses(), folder, rungs=RUNGS)
        with self._context() as context:
            yield TrialsView(
                context, task, candidates, scoring=False, to_end=len(candidates), planned=steps * len(candidates)
            )

    def record(self) -> None:
        assert self.output is not None
        with self._context() as context:
            record_trials(context, self.output)

    @contextmanager
    def _context(self) -> Iterator[Context]:
        recipe = load_recipe("smollm2-135m-cpu")
        locations = resolve_locations(self.storage)
        console = Console()
        console.say = lambda message="": None  # type: ignore[method-assign]
        spool = Spool(locations.spool("many-trials"))
        yield Context(
            recipe=recipe,
            locations=locations,
            console=console,
            run_key="many-trials",
            current=recipe.family[0],
            start_ray=_no_ray,
            workers=Workers(console, start_ray=_no_ray, computes_here=lambda: True, scratch=""),
            spool=spool,
            mlflow_run_id=lambda record: None,
        )
        spool.close()


def made_up_trial(architecture: Architecture, report: Report) -> None:
    report(Started(1))
    for step in range(1, TUNE_STEPS + 1):
        report(Progress(step, METRICS))
    report(Finished(TUNE_STEPS, 1.0, 2.0))


def _no_ray(*_: Any) -> Any:
    raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=512, help="held-out rows")
    parser.add_argument("--on-tune", type=int, default=1000, help="trials that Ray Tune runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        driver = Driver(Path(folder), architectures(arguments.trials), arguments.on_tune)
        write_trials(driver.trials, driver.made, arguments.rows)
        gc.collect()
        before = memory_now()
        print(f"{arguments.trials:,} trials, {arguments.rows} held-out rows; {machine()}\n")
        print("| | seconds | peak memory, GB |\n|---|---|---|")
        for name, step in driver.steps().items():
            restart_peak()
            started = time.perf_counter()
            step()
            print(f"| {name} | {time.perf_counter() - started:.1f} | {(peak_memory() - before) / 1e9:.2f} |")


if __name__ == "__main__":
    main()

"""What Prometheus gets of a run, from the events of its records."""

from __future__ import annotations

import pytest

from minitron_platform.monitoring import LAST_STEP, Monitor
from minitron_platform.tracking.events import STATE_TAG, TRAINING
from minitron_platform.tracking.spool import RunLog, Spool


@pytest.fixture
def monitor(spool):
    monitor = Monitor("run")
    spool.on_event = monitor.event
    return monitor


@pytest.fixture
def spool(tmp_path):
    return Spool(str(tmp_path / "spool"))


def value(monitor, name, **tags):
    return monitor.values().get((name, tuple(tags.items())))


def trial(spool, number) -> RunLog:
    log = spool.record(f"run.trial-{number}")
    log.start(f"trial {number}", parent="run.search", tags={"minitron.kind": "trial"})
    log.tags({STATE_TAG: TRAINING})
    return log


def test_a_training_that_never_reports_a_step_has_a_time_from_which_it_stalls(monitor, spool):
    for stage in ("data", "small.distill"):
        spool.record(f"run.{stage}").start(stage, parent="run", tags={"minitron.kind": "stage"})
    trial(spool, 1)
    assert value(monitor, LAST_STEP, part="small.distill") > 0
    assert value(monitor, LAST_STEP, part="trial-1") > 0
    assert value(monitor, LAST_STEP, part="data") is None  # which trains nothing


@pytest.mark.parametrize("state", ["paused at step 4", "finished"])
def test_a_trial_that_waits_for_others_does_not_stall(monitor, spool, state):
    log = trial(spool, 1)
    log.metrics({"tokens_per_second": 7.0}, step=4)
    log.tags({STATE_TAG: state})
    assert value(monitor, "running", part="trial-1", kind="trial") == 1  # open in MLflow until the search ends
    assert value(monitor, LAST_STEP, part="trial-1") is None
    assert value(monitor, "tokens_per_second", part="trial-1") == 0
    log.tags({STATE_TAG: TRAINING})
    assert value(monitor, LAST_STEP, part="trial-1") > 0


def test_parts_are_counted_by_state(monitor, spool):
    logs = [trial(spool, number) for number in range(3)]
    logs[0].end("FINISHED")
    logs[1].end("FAILED")
    logs[1].start("again", parent="run.search", tags={"minitron.kind": "trial"})
    logs[1].end("FINISHED")
    states = {state: value(monitor, "parts", kind="trial", state=state) for state in ("running", "finished", "failed")}
    assert states == {"running": 1, "finished": 2, "failed": 0}

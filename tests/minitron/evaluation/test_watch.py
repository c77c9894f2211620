"""Benchmarks during a training: noise raises no alarm, a fall that is more than noise does if the KL falls too."""

from __future__ import annotations

import json
import random

import pytest

from minitron.evaluation import DocumentResult, Evaluated, Score
from minitron.evaluation.watch import TaskWatch
from minitron_platform.training.events import Alarm
from minitron_platform.training.view import TrainingView


def results(values, higher_is_better=True):
    documents = tuple(DocumentResult(str(n), str(n), str(n), {"acc,none": float(v)}) for n, v in enumerate(values))
    score = Score("arc", "acc", sum(values) / len(values), None, len(values), 0, "1", "test", higher_is_better, 5_000)
    return {"arc": Evaluated(score, "none", (), documents)}


RIGHT = [n % 2 for n in range(200)]
FALLEN = [0 if n < 60 else value for n, value in enumerate(RIGHT)]  # 30 of 100 right answers are lost


def test_a_fall_beyond_the_noise_raises_an_alarm_only_if_the_kl_falls():
    watch = TaskWatch(10)
    assert watch.add(100, results(RIGHT), 1.0) == ({}, [])
    resumed = TaskWatch(10, json.loads(json.dumps(watch.first)))
    for each in (watch, resumed):
        changes, (fall,) = each.add(200, results(FALLEN), 0.9)
        assert changes["arc"].value == pytest.approx(-0.15)
        assert 0.05 < changes["arc"].band < 0.15
        assert "changed by -15.0 % from step 100 to step 200" in fall.text
        assert "first 200 of 5,000 documents of test" in fall.text
        for kl in (1.0, 1.1, None):
            assert each.add(300, results(FALLEN), kl)[1] == []
        assert each.add(300, results([1] * 200), 0.9)[1] == []
    assert resumed.add(100, results(FALLEN), 0.9) == ({}, [])  # from a checkpoint before the first measurement
    lower = TaskWatch(10)
    lower.add(100, results(RIGHT, higher_is_better=False), 1.0)
    assert lower.add(200, results(FALLEN, higher_is_better=False), 0.9)[1] == []


def test_noise_seldom_raises_an_alarm():
    """Ten measurements of a model that does not change, each with its own errors, in 60 trainings."""
    draw = random.Random(5)
    alarms = 0
    for _ in range(60):
        watch = TaskWatch(10)
        watch.add(0, results([draw.random() < 0.5 for _ in range(100)]), 1.0)
        alarms += any(watch.add(n, results([draw.random() < 0.5 for _ in range(100)]), 0.5)[1] for n in range(1, 11))
    assert alarms <= 6


class _Recorded:
    def __init__(self):
        self.lines = []
        self.tagged = {}

    def say(self, line):
        self.lines.append(line)

    def tags(self, values):
        self.tagged |= values


def test_an_alarm_is_shown_and_tagged(tmp_path):
    recorded = _Recorded()
    view = TrainingView(recorded, recorded, 10, restarts=str(tmp_path / "restarts.json"), max_failures=0)
    view.event(Alarm("arc", "arc acc fell"))
    assert recorded.lines == ["  [yellow]alarm[/]  arc acc fell"]
    assert recorded.tagged == {"minitron.alarm.arc": "arc acc fell"}

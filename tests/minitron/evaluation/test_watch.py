"""Benchmarks during a training: noise raises no alarm, a fall that is more than noise does if the KL falls too."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch.distributed as dist
from helpers import distilling
from helpers.evaluating import arc_documents, write_jsonl

from minitron.data import Rows
from minitron.distill import DistillConfig, Losses, store_hidden
from minitron.distill.inputs import DistillInputs
from minitron.evaluation import DocumentResult, Evaluated, Score, Task
from minitron.evaluation.estimates import replicates
from minitron.evaluation.watch import TaskWatch
from minitron_platform.console import Console
from minitron_platform.training.events import Alarm, Measured, Tagged
from minitron_platform.training.train import TrainTask, train
from minitron_platform.training.view import TrainingView
from minitron_platform.workers.worker import Worker


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
        for kl in (1.0, 1.1):
            assert each.add(300, results(FALLEN), kl)[1] == []
        assert each.add(300, results([1] * 200), 0.9)[1] == []
    assert resumed.add(100, results(FALLEN), 0.9) == ({}, [])  # from a checkpoint before the first measurement
    lower = TaskWatch(10)
    lower.add(100, results(RIGHT, higher_is_better=False), 1.0)
    assert lower.add(200, results(FALLEN, higher_is_better=False), 0.9)[1] == []


def test_a_score_that_is_no_mean_over_documents_raises_an_alarm_too():
    """Such as an F1, whose noise is that of documents drawn again."""

    def f1(answers):
        def measure(pairs):
            both = sum(truth and answer for truth, answer in pairs)
            return 2 * both / sum(truth + answer for truth, answer in pairs)

        pairs = list(zip(RIGHT, answers, strict=True))
        documents = tuple(DocumentResult(str(n), str(n), str(n), {}) for n in range(len(pairs)))
        score = Score("cb", "f1", measure(pairs), None, len(pairs), 0, "1", "test", True, 5_000)
        return {"cb": Evaluated(score, "none", (), documents, (), replicates(measure, pairs, range(len(pairs))))}

    watch = TaskWatch(10)
    watch.add(100, f1(RIGHT), 1.0)
    changes, (fall,) = watch.add(200, f1(FALLEN), 0.9)
    assert changes["cb"].value < -changes["cb"].band < 0
    assert fall.text.startswith("cb f1 changed by")
    assert watch.add(300, {"cb": replace(f1(FALLEN)["cb"], replicates=())}, 0.9) == ({}, [])


def test_a_first_measurement_of_an_earlier_version_without_a_kl_is_replaced():
    watch = TaskWatch(10)
    watch.add(100, results(RIGHT), 1.0)
    old = TaskWatch(10, watch.first | {"kl": None})
    assert old.add(200, results(RIGHT), 1.0) == ({}, [])
    assert old.add(300, results(FALLEN), 0.9)[1]


def test_a_training_measures_the_kl_whenever_it_runs_the_tasks(material, tmp_path):
    """Also where the interval of the held-out rows is another one: without a KL there is no alarm."""
    teacher, heldout = str(material / "teacher"), str(tmp_path / "heldout")
    inputs = DistillInputs(teacher, "t", "float32", str(material / "rows"), str(material / "hidden"), heldout)
    rows = Rows.open(inputs.rows, "heldout")
    store_hidden(lambda: distilling.load_teacher(material), rows, heldout, key=inputs.targets_key("heldout"))
    config = DistillConfig(
        steps=4, batch_rows=2, micro_batch_rows=2, warmup_steps=1, evaluate_every=3, checkpoint_every=3
    )
    folders = {name: str(tmp_path / name) for name in ("checkpoints", "curve", "result")}
    documents = write_jsonl(tmp_path / "arc" / "test.jsonl", arc_documents(4))
    losses = Losses(logits="none", cross_entropy=1.0)
    task = TrainTask(
        inputs,
        config,
        losses,
        **folders,
        key="key",
        student=teacher,
        tasks_every=2,
        tasks=(Task("arc_easy", str(documents)),),
    )
    sent = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert train(task, Worker(0, 1, Console(), sent.append)) is None
    finally:
        dist.destroy_process_group()
    measured = [event for event in sent if isinstance(event, Measured)]
    kl = {event.step: event.values["heldout_kl"] for event in measured if "heldout_kl" in event.values}
    assert set(kl) == {2, 3, 4}
    scored = {event.step: event.values for event in measured if "task_arc_easy.acc" in event.values}
    assert {step: values["task_arc_easy.documents"] for step, values in scored.items()} == {2: 4, 4: 4}
    first = json.loads((tmp_path / "checkpoints" / "first-scores.json").read_text())
    assert (first["step"], first["kl"]) == (2, kl[2])
    assert [event.values for event in sent if isinstance(event, Tagged)] == [{"minitron.no_alarm": "none"}]


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

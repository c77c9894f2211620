"""Work that is stored is not done again when a worker dies before it has returned, and the user sees what happened."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch.distributed as dist
from helpers import tiny

from minitron import storage
from minitron.distill import DistillConfig, Losses
from minitron.distill.inputs import DistillInputs
from minitron.errors import TakenOverError
from minitron.evaluation import HeldoutMetrics
from minitron.models import load_model
from minitron.pruning.source import PruningSource
from minitron_platform import load_recipe, run
from minitron_platform.console import Console
from minitron_platform.stages.distill import _prune, _Pruning
from minitron_platform.stages.evaluate import MODELS, Evaluation, Quality, _evaluate
from minitron_platform.tracking.restarts import read_restarts
from minitron_platform.tracking.spool import Spool
from minitron_platform.training.events import Measured, Resumed
from minitron_platform.training.train import TrainTask, train
from minitron_platform.training.view import TrainingView
from minitron_platform.workers import models
from minitron_platform.workers.worker import Worker, WorkersFailed, WorkerStarted
from minitron_platform.workers.workers import Workers


def _lost():
    raise TakenOverError("taken over", "follow the other driver")


def _files(folder):
    """What others see in a storage: not what a process has not published yet."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}


def test_workers_of_a_stage_read_no_model_again_and_write_nothing_for_a_driver_that_was_replaced(
    bench, tmp_path, monkeypatch, capsys
):
    loads, again, refused = [], {}, set()
    load, compute = models.load, Workers.compute

    def loaded(*arguments):
        loads.append(arguments)
        return load(*arguments)

    def for_a_replaced_driver(self, name, *call, **how):
        own, known, before = self.before_commit, len(loads), _files(tmp_path / "stages")
        self.before_commit = lambda: _lost
        try:
            compute(self, *call, **how)
        except TakenOverError:
            refused.add(name)
        assert _files(tmp_path / "stages") == before
        self.before_commit = own
        del loads[known:]

    def twice(self, function, task, **how):
        name = function.__module__.rsplit(".", 1)[-1]
        for_a_replaced_driver(self, name, function, task, **how)
        on_event = self._failure_handler(3)
        for event in (WorkerStarted(1, "node-1"), WorkersFailed((1,), f"killed in {name}")):
            on_event(event)
        compute(self, function, task, **how)
        before = len(loads)
        result = compute(self, function, task, **how)
        again[name] = len(loads) - before
        return result

    monkeypatch.setattr(models, "load", loaded)
    monkeypatch.setattr(Workers, "compute", twice)
    run(load_recipe(str(bench / "recipe.yaml")), storage_path=str(tmp_path), until="targets")
    assert again == {"teacher": 0, "data": 1, "calibrate": 0, "targets": 0}  # a loss on a few rows is not stored
    assert len(loads) == 3 + 1
    assert refused == {"teacher", "data", "calibrate", "targets"}
    # what fails is in the stage's output, from which the report has it, and in its record
    sent = "".join(part.read_text() for part in (tmp_path / "runs").glob("*/spool/*.jsonl"))
    for name in sorted(refused):
        (stored,) = (tmp_path / "stages" / name).glob("*/stage.json")
        restarts = json.loads(stored.read_text())["outputs"]["restarts"]
        assert {(one["node"], one["reason"], one["left"]) for one in restarts} == {("node-1", f"killed in {name}", 2)}
        assert f"worker 1 on node-1: killed in {name}; started again, 2 restarts left" in sent
    assert "teacher's outputs on 112 rows · 112 reused from before the workers' last start" in capsys.readouterr().out


def test_processes_evaluate_what_the_first_one_does_not_find_stored(tmp_path, monkeypatch, free_port):
    """A worker of an earlier driver may still write while they look."""
    measured = Quality(loss=1.0, kl=0.1, top1_agreement=0.9, heldout_tokens=32)
    stored = {name: str(tmp_path / f"{name}.json") for name in MODELS}
    for path in stored.values():
        storage.write_json(path, measured.model_dump(mode="json"))
    task = Evaluation(
        inputs=DistillInputs(*(["missing"] * 6)),
        tokenizer="missing",
        models=dict.fromkeys(MODELS, "missing"),
        stored=stored,
        speeds=None,
        tasks=(),
        batch_rows="auto",
        add_bos=None,
        answers="missing",
        prompts=(),
        completed={},
    )
    exists = storage.exists
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(storage, "exists", lambda path: exists(path) and dist.get_rank() == 0)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_evaluate_in_group, args=(task, rank), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]


def _evaluate_in_group(task: Evaluation, rank: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    _evaluate(task, Worker(rank, 2, Console(), print))
    dist.destroy_process_group()


def test_a_training_whose_model_is_stored_does_not_train_again(tmp_path):
    with storage.committed_folder(str(tmp_path / "student")) as folder:
        (folder / "config.json").write_text("{}")
    missing = DistillInputs(*(["missing"] * 6))
    task = TrainTask(
        missing, DistillConfig(steps=1), Losses(), "checkpoints", "curve.json", str(tmp_path / "student"), "key"
    )
    sent = []
    assert train(task, Worker(0, 1, Console(), sent.append)) is None
    assert not sent


def test_a_training_of_a_driver_that_was_replaced_changes_nothing(material, tmp_path):
    inputs = DistillInputs(str(material / "teacher"), "t", "float32", str(material / "rows"), "", "")
    config = DistillConfig(steps=4, batch_rows=2, micro_batch_rows=2, warmup_steps=1, checkpoint_every=2)
    files = {name: str(tmp_path / "out" / name) for name in ("checkpoints", "curve", "result")}
    task = TrainTask(inputs, config, Losses(logits="none", cross_entropy=1.0), **files, key="key")
    replaced_at, seen = [], []

    def send(event):
        if isinstance(event, Measured) and [event.step] == replaced_at:
            seen.append(_files(tmp_path / "out"))

    def check():
        if seen:
            _lost()

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for step in (1, 4):  # before the first checkpoint, and before the curve and the model are written
            replaced_at[:] = [step]
            with pytest.raises(TakenOverError):
                train(task, Worker(0, 1, Console(), send, before_commit=check))
            assert _files(tmp_path / "out") == seen.pop()
    finally:
        dist.destroy_process_group()


def test_a_training_says_which_step_it_saves_when_its_node_is_about_to_be_taken_away(material, tmp_path, capsys):
    inputs = DistillInputs(str(material / "teacher"), "t", "float32", str(material / "rows"), "", "")
    config = DistillConfig(steps=4, batch_rows=2, micro_batch_rows=2, warmup_steps=1, checkpoint_every=1000)
    files = {name: str(tmp_path / name) for name in ("checkpoints", "curve", "result")}
    task = TrainTask(inputs, config, Losses(logits="none", cross_entropy=1.0), **files, key="key")
    steps = iter([False, True])
    worker = Worker(0, 1, Console(), lambda event: None, is_leaving=lambda: next(steps, True))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert train(task, worker) is None
    finally:
        dist.destroy_process_group()
    assert "a node is about to be taken away; step 2 is saved" in capsys.readouterr().out


def test_a_student_whose_checkpoint_is_stored_is_not_pruned_again(tmp_path):
    with storage.committed_folder(str(tmp_path / "pruned")) as folder:
        (folder / "config.json").write_text("{}")
    source = PruningSource("missing", "missing", "float32")
    _prune(_Pruning(source, tiny.architecture(tiny.model()), str(tmp_path / "pruned")), Worker(0, 1, Console(), print))


def _give(*_, **__):
    return HeldoutMetrics(loss=1.0, kl=0.1, top1_agreement=0.9, tokens=32, per_row_loss=[1.0], per_row_kl=[0.1])


def test_no_student_is_pruned_and_nothing_is_evaluated_for_a_driver_that_was_replaced(material, tmp_path, monkeypatch):
    worker = Worker(0, 1, Console(), print, before_commit=_lost)
    architecture = tiny.architecture(load_model(material / "teacher"))
    source = PruningSource(str(material / "teacher"), str(material / "scores.safetensors"), "float32")
    with pytest.raises(TakenOverError):
        _prune(_Pruning(source, architecture, str(tmp_path / "pruned")), worker)

    measured = Quality(loss=1.0, kl=0.1, top1_agreement=0.9, heldout_tokens=32).model_dump(mode="json")
    teacher = str(material / "teacher")
    monkeypatch.setattr(DistillInputs, "heldout", _give)
    monkeypatch.setattr("minitron_platform.stages.evaluate.interleaved_throughput", lambda *_, **__: {})
    rows = [str(material / name) for name in ("rows", "train", "heldout")]
    task = Evaluation(
        inputs=DistillInputs(teacher, "t", "float32", *rows),
        tokenizer=teacher,
        models=dict.fromkeys(MODELS, teacher),
        stored={name: str(tmp_path / f"{name}.json") for name in MODELS},
        speeds=str(tmp_path / "speeds.json"),
        tasks=(),
        batch_rows="auto",
        add_bos=None,
        answers="missing",
        prompts=("a",),
        completed={name: str(tmp_path / f"completed-{name}.json") for name in MODELS},
    )
    writes = [*task.stored.values(), *task.completed.values()]
    for written in range(len(writes) + 1):  # of what was stored before
        for path in writes[:written]:
            storage.write_json(path, measured if path in task.stored.values() else ["a"])
        before = _files(tmp_path)
        with pytest.raises(TakenOverError):
            _evaluate(task, worker)
        assert _files(tmp_path) == before


def test_a_failure_is_stored_when_it_happens_whether_or_not_the_training_goes_on(tmp_path, capsys):
    spool = Spool(str(tmp_path / "spool"))
    path, run = str(tmp_path / "restarts.json"), spool.record("run")
    run.start("run", of="fingerprint")

    def view(**options):
        return TrainingView(Console(), run, 10, restarts=path, max_failures=1, **options)

    first = view()
    for event in (
        WorkerStarted(1, "node-1"),
        WorkersFailed((1,), "killed"),
        Resumed(4),
        WorkersFailed((0,), "out of memory", restarted=False),
    ):
        first.event(event)
    assert [(known.node, known.reason, known.step) for known in read_restarts(path)] == [
        ("node-1", "killed", 4),
        ("", "out of memory", None),
    ]
    view().event(WorkersFailed((0,), "killed again"))  # the next driver, which is killed before the workers resume
    with pytest.raises(TakenOverError):
        view(before_commit=_lost).event(WorkersFailed((0,), "killed for another driver"))
    assert [known.reason for known in read_restarts(path)] == ["killed", "out of memory", "killed again"]
    spool.close()
    sent = "".join(part.read_text() for part in (tmp_path / "spool").glob("*.jsonl"))
    assert "out of memory; not resumed, 0 restarts left" in sent
    assert "killed again; not resumed, 0 restarts left" in sent
    shown = capsys.readouterr().out
    assert "worker 1 on node-1: killed; restarting, 0 restarts left" in shown
    assert "worker 0: out of memory; no restarts left" in shown


@pytest.mark.parametrize("announced", [False, True])
def test_a_node_that_is_taken_away_is_no_failure(announced, tmp_path, capsys):
    spool = Spool(str(tmp_path / "spool"))
    view = TrainingView(Console(), spool.record("run"), 10, restarts=str(tmp_path / "restarts.json"), max_failures=1)
    for ranks in ((), (0, 1)) if announced else ((1,),):
        view.event(WorkersFailed(ranks, "its node is taken away", counts=not announced))
    spool.close()
    shown = capsys.readouterr().out
    assert f"{'1 restart' if announced else '0 restarts'} left" in shown
    assert ("workers: its node" in shown) == announced

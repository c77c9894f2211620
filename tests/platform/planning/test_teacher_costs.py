"""The teacher of a distillation: stored or online, all logits or the top-k tokens, with their costs in the plan."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch
from helpers.distilling import CONFIG

from minitron.data import Rows, rows_of_steps
from minitron.device import cores
from minitron.distill import LiveTeacher, Losses, TopKTeacher, store_top_k
from minitron.distill.inputs import DistillInputs
from minitron.distill.teacher.stored import stored_bytes
from minitron.errors import InputError, StorageError
from minitron.models import load_model
from minitron_platform import load_recipe, plan
from minitron_platform.training.train import TrainTask, _start


def _plan(bench, tmp_path, *overrides):
    return plan(load_recipe(str(bench / "recipe.yaml"), overrides), storage_path=str(tmp_path / "runs"))


@pytest.fixture
def planned(bench, tmp_path):
    return lambda *overrides: _plan(bench, tmp_path, *overrides)


def test_a_plan_shows_the_costs_of_both_modes(planned):
    stored, online = planned("losses.hidden=[]"), planned("losses.hidden=[]", "targets.mode=online")
    assert stored.teacher_costs == online.teacher_costs
    either = stored.teacher_costs
    assert [cost.rows for cost in either.values()] == [96 + 16, 6 * 4 + 16]
    assert either["online"].bytes == stored_bytes(40, 32, 48, 4)
    forward = stored.teacher.flops_per_token(32) * 32
    assert [cost.stored_flops for cost in either.values()] == [forward * 112, forward * 40]
    assert [cost.online_flops for cost in either.values()] == [0, forward * 24 * 4]

    def parts(found, name):
        return {cost.stage: getattr(cost.estimate, name) for cost in found.costs}

    for found, mode in ((stored, "stored"), (online, "online")):
        assert parts(found, "bytes")["targets"] == either[mode].bytes
        assert parts(found, "flops")["targets"] == either[mode].stored_flops
    more = parts(online, "flops")["distill"] - parts(stored, "flops")["distill"]
    head = 2 * stored.teacher.vocab_size * stored.teacher.hidden_size * 32 * 24 * 4  # the loss runs it in both modes
    assert more == pytest.approx(either["online"].online_flops - head)
    top = planned("targets.top_k=5", "losses.hidden=[]").teacher_costs["stored"]
    assert top.bytes == 96 * 32 * 5 * 8 + stored_bytes(16, 32, 48, 4)


def test_a_plan_knows_what_a_billion_tokens_of_text_take(planned, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**15, 0, 10**15))
    rows = 10**9 // 32 - 16
    cost = next(cost for cost in planned(f"data.train_rows={rows}").costs if cost.stage == "data")
    assert cost.estimate.bytes == 8 * 10**9, "tokens of 4 bytes, in parts and in rows"
    assert cost.seconds == pytest.approx(10**9 / 300_000 / cores(), rel=0.1)


def test_a_disk_that_is_too_small_is_refused_with_the_settings_that_fit(planned, monkeypatch):
    whole = planned()
    usage = namedtuple("usage", "total used free")
    row = stored_bytes(1, 32, 48, 4) + 4 * 32

    def free(missing):
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, whole.bytes - missing))

    free(30 * row)
    with pytest.raises(StorageError, match="66 of 96 training rows fit") as refused:
        planned()
    assert "targets.mode=online" in refused.value.remedy
    assert "lower data.train_rows to 66" in refused.value.remedy
    planned("data.train_rows=66")
    assert planned("targets.mode=online").bytes < whole.bytes - 30 * row
    free(31 * row)
    with pytest.raises(StorageError, match="65 of 66 training rows fit"):
        planned("data.train_rows=66")
    free(80 * row)  # too little for the other mode as well
    with pytest.raises(StorageError) as refused:
        planned()
    assert "online" not in refused.value.remedy


REFUSED = {
    "more than is stored": (
        ["targets.top_k=5", "losses.top_k=6"],
        "losses.top_k: 6 is more than targets.top_k: 5",
        "at most 5",
    ),
    "more than there is": (
        ["targets.top_k=400"],
        "targets.top_k: 400 is more than the teacher's vocabulary of 300 tokens",
        "at most 300",
    ),
    "another divergence": (["targets.top_k=5", "losses.logits=mse"], "losses.logits: mse", "forward_kl"),
    "hidden states": (["targets.top_k=5", "losses.hidden=['last-1:last-1']"], "3 of 5 layers", "targets.mode=online"),
    "hidden states by themselves": (["targets.top_k=5"], "3 of 5 layers", "losses.hidden=[]"),
    "tasks of a trial": (
        ["search.training.evaluate_tasks_every=2"],
        "search.training.evaluate_tasks_every: 2",
        "leave",
    ),
    "no tasks": (["evaluate.tasks=[]", "distill.evaluate_tasks_every=2"], "no evaluate.tasks", "name evaluate.tasks"),
    "one run of the tasks": (
        ["distill.evaluate_tasks_every=13"],
        "13 of distill.steps: 24 leaves fewer than",
        "at most 12",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradicting_teacher_settings_are_refused(planned, case):
    overrides, problem, remedy = REFUSED[case]
    with pytest.raises(InputError) as refused:
        planned(*overrides)
    assert problem in refused.value.problem
    assert remedy in refused.value.remedy


def test_compatible_teacher_settings_are_planned(planned):
    planned("targets.top_k=5", "losses.top_k=3", "losses.hidden=[]")
    planned("targets.top_k=5", "targets.mode=online")
    planned("distill.evaluate_tasks_every=2")


def test_a_worker_starts_with_the_teacher_of_its_task(material, tmp_path):
    def start(top_k=0, **options):
        reads = DistillInputs(
            str(material / "teacher"), "t", "float32", str(material / "rows"), str(tmp_path), "", top_k
        )
        task = TrainTask(reads, CONFIG, Losses(top_k=top_k), "", "", "", "k", student=reads.teacher, **options)
        return _start(task)

    rows = Rows.open(str(material / "rows"), "train")
    reads = DistillInputs(str(material / "teacher"), "t", "float32", str(material / "rows"), str(tmp_path), "", 5)
    store_top_k(lambda: load_model(reads.teacher), rows, str(tmp_path), 5, key=reads.targets_key("train"))
    student, _, targets, head = start(top_k=5)
    assert isinstance(targets, TopKTeacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(StorageError, match="holds the store"):
        start()  # hidden states
    student, _, targets, live_head = start(online=True)
    assert isinstance(targets, LiveTeacher)
    assert torch.equal(head.weight, live_head.weight)
    assert not any(parameter.requires_grad for parameter in targets.model.parameters())
    assert not any(a is b for a, b in zip(student.parameters(), targets.model.parameters(), strict=True))


def test_the_rows_of_the_first_steps_are_those_that_training_reads():
    assert rows_of_steps(80, 4, 20, seed=3) == list(range(80))
    few = rows_of_steps(80, 4, 5, seed=3)
    assert few == sorted(set(few))
    assert len(few) == 20
    assert few != rows_of_steps(80, 4, 5, seed=4)


def test_held_out_targets_are_hidden_states_even_with_top_k(material, tmp_path):
    exact, best = (
        DistillInputs(str(material / "teacher"), "t", "float32", str(material / "rows"), "", str(tmp_path), k)
        for k in (0, 5)
    )
    assert exact.targets_key("heldout") == best.targets_key("heldout")
    assert exact.targets_key("train") != best.targets_key("train")

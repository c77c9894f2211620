"""Training in several processes that are killed, whose number changes, that shard a teacher, and that run benchmarks.

One program forks all these processes once; the tests check its results.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import tiny
from helpers.distilling import (
    CHANNELS,
    CONFIG,
    INTERMEDIATE,
    live_teacher,
    load_teacher,
    pruned_student,
)
from helpers.forking import import_before_fork
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from minitron.data import Rows, rows_for_step
from minitron.data.rows import _permutation
from minitron.distill import LiveTeacher, Losses, distill, read_curve
from minitron.distill.checkpoints import Checkpoints, committed_steps
from minitron.distill.inputs import DistillInputs
from minitron.distill.state import TrainingState
from minitron.evaluation import Task
from minitron_platform.addresses import free_ports
from minitron_platform.training.train import TrainTask, task_metrics, task_results

# 5 rows for 2 processes: unequal parts
STEPS = replace(CONFIG, steps=10, batch_rows=5, micro_batch_rows=1, checkpoint_every=2)
SHARDED = replace(STEPS, shard=True)


class Watched(LiveTeacher):
    """A teacher that records the rows of its batches."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.asked = []

    def batch(self, indices, tokens):
        self.asked += indices
        return super().batch(indices, tokens)


def write_questions(folder):
    """Write a benchmark with six questions."""
    with open(folder / "arc.jsonl", "w") as file:
        for number, text in enumerate(tiny.texts(6, seed=7)):
            words = text.split()
            choices = {"text": [words[8], "stone cloud", "river river"], "label": ["A", "B", "C"]}
            line = {"id": str(number), "question": " ".join(words[:8]), "choices": choices, "answerKey": "A"}
            file.write(json.dumps(line) + "\n")


def scores(folder, model):
    """The scores of a student on that benchmark."""
    materials = DistillInputs(str(folder / "teacher"), "t", "float32", str(folder / "rows"), "", "")
    task = TrainTask(
        materials, STEPS, Losses(), "", "", "", "k", tasks=(Task("arc_easy", data=str(folder / "arc.jsonl")),)
    )
    return task_metrics(task_results(task, model, lambda name, error: pytest.fail(f"{name}: {error}")), {})


def train(folder, config, *, split=False, losses=INTERMEDIATE, kill_at=0, tasks=False, out=None, **options):
    """Train; returns what this process recorded. Every step is written to `out` as soon as it is done."""
    teacher = Watched(load_teacher(folder), shard=split)
    seen = {"losses": [], "rows": [], "scores": []}

    def report(step):
        seen["losses"].append((step.step, step.loss))
        seen["rows"].append(list(teacher.asked))
        teacher.asked.clear()
        if out:
            with open(out, "a") as file:
                file.write(json.dumps([step.step, step.loss]) + "\n")
        if step.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    student = distill(
        pruned_student(folder),
        teacher,
        Rows.open(str(folder / "rows"), "train"),
        replace(config, evaluate_every=3 if tasks else 0),
        losses=losses,
        channels=CHANNELS,
        key="k",
        report=report,
        evaluate=lambda _, model: seen["scores"].append(scores(folder, model)),
        **options,
    )
    parameters = list(teacher.model.parameters())
    seen["teacher"] = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    seen["gradients"] = sum(p.requires_grad or p.grad is not None for p in parameters)
    return seen, student


def _die_in_gathering():
    """Kill this process when it gathers the trained student. Of the tensors that a step gathers, all are scalars."""
    full_tensor = DTensor.full_tensor

    def gather(tensor, **options):
        if tensor.ndim:
            os.kill(os.getpid(), signal.SIGKILL)
        return full_tensor(tensor, **options)

    DTensor.full_tensor = gather


def _process(rank, world, port, name, kill_after, kill_gathering, job):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    if kill_after:
        threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if kill_gathering:
        _die_in_gathering()
    if job.get("checkpoints"):
        job["out"] = f"{job['checkpoints']}-{rank}.jsonl"
    seen, student = train(**job)
    Path(f"{name}-{rank}.json").write_text(json.dumps(seen))
    save_file(dict(student.named_parameters()), f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


def _together(name, job, *, world=2, victim=None, kill_at=0, kill_after=0.0, kill_gathering=False):
    """Run a job in `world` forked processes; with a `victim`, until that process has been killed, and then kill the others."""
    port = free_ports(1)[0]
    fork, processes = multiprocessing.get_context("fork"), []
    for rank in range(world):
        dies = rank == victim
        own = {**job, "kill_at": kill_at if dies else 0}
        ways = kill_after if dies else 0, kill_gathering and dies
        processes.append(fork.Process(target=_process, args=(rank, world, port, name, *ways, own), daemon=True))
    for process in processes:
        process.start()
    if victim is not None:
        processes[victim].join(timeout=100)
        for process in processes:
            process.kill()
    for process in processes:
        process.join(timeout=100)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world if victim is None else codes[victim] == -signal.SIGKILL, (name, codes)


def everything(folder, out):
    """All runs whose results the tests use."""
    import_before_fork()
    sharded = {"folder": folder, "config": SHARDED}
    began = time.monotonic()
    _together(f"{out}/whole", sharded)
    took = time.monotonic() - began
    # killed while a checkpoint is written, at a step without a checkpoint, and at a random time
    killed = {**sharded, "checkpoints": f"{out}/killed"}
    for victim, kill in enumerate(({"kill_at": 3}, {"kill_at": 6}, {"kill_after": took / 2})):
        try:
            _together(f"{out}/killed", killed, victim=victim % 2, **kill)
        except AssertionError:
            if "kill_at" in kill:
                raise  # a random time may be after the end
    _together(f"{out}/killed", killed, victim=1, kill_gathering=True)
    _together(f"{out}/killed", killed)
    elastic = {"folder": folder, "config": STEPS, "losses": Losses(), "checkpoints": f"{out}/elastic"}
    for part, (world, until) in enumerate(((2, 4), (1, 7), (2, 10))):
        _together(f"{out}/elastic{part}", {**elastic, "until": until}, world=world)
    short = {"folder": folder, "config": replace(STEPS, steps=5, checkpoint_every=2)}
    _together(f"{out}/replicated", short)
    stopped = {**short, "checkpoints": f"{out}/replicated-killed"}
    # no earlier: that of step 2 is certainly committed only when that of step 4 is begun
    _together(f"{out}/replicated-killed", stopped, victim=1, kill_at=5)
    _together(f"{out}/replicated-killed", stopped)
    _together(f"{out}/split", {**short, "split": True})
    _together(f"{out}/both", {**sharded, "split": True, "tasks": True})


PROGRAM = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import test_resume
from pathlib import Path
test_resume.everything(Path(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture(scope="module")
def done(material, tmp_path_factory):
    out = tmp_path_factory.mktemp("processes")
    write_questions(material)
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, paths, str(material), str(out)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return out


def _saw(done, name, rank):
    return json.loads((done / f"{name}-{rank}.json").read_text())


def _logged(path):
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


def test_curve_and_weights_are_bit_identical_after_a_kill(done):
    """Of a student that every process has as a whole; the next test shards it."""
    whole = _saw(done, "replicated", 0)["losses"]
    resumed = _saw(done, "replicated-killed", 0)["losses"]
    assert resumed in (whole[2:], whole[4:])  # from step 2, or from step 4 if that was committed in time
    one, other = (load_file(done / f"{name}-0.safetensors") for name in ("replicated", "replicated-killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_curve_and_weights_are_bit_identical_after_any_number_of_kills_at_any_time(done):
    whole = dict(map(tuple, _saw(done, "whole", 0)["losses"]))
    assert list(whole) == list(range(1, 11))
    for rank in range(2):
        lines = _logged(done / f"killed-{rank}.jsonl")
        assert {step for step, _ in lines} == set(whole)
        assert all(loss == whole[step] for step, loss in lines)
        begun = [step for (before, _), (step, _) in zip(lines, lines[1:], strict=False) if step <= before]
        assert begun  # it resumed from a checkpoint,
        assert max(begun) > 1  # not only from the start
        one, other = (load_file(done / f"{name}-{rank}.safetensors") for name in ("whole", "killed"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    # the curve beside the checkpoints is complete, with each step once
    assert [(point.step, point.loss) for point in read_curve(str(done / "killed"))] == list(whole.items())


def test_a_kill_while_the_trained_student_is_gathered_repeats_no_step(done):
    for rank in range(2):
        assert _logged(done / f"killed-{rank}.jsonl")[-1][0] == SHARDED.steps
        last = _saw(done, "killed", rank)  # whose weights are compared above
        assert last["losses"] == last["rows"] == []


def test_rows_and_their_order_do_not_depend_on_the_number_of_processes(done, material):
    alone, _ = train(material, STEPS, losses=Losses())
    rows, losses = [], []
    for part, world in enumerate((2, 1, 2)):
        seen = [_saw(done, f"elastic{part}", rank) for rank in range(world)]
        for step in range(len(seen[0]["losses"])):
            mine = [one["rows"][step] for one in seen]
            rows.append([mine[place % world][place // world] for place in range(STEPS.batch_rows)])
            assert sum(map(len, mine)) == STEPS.batch_rows
        losses += seen[0]["losses"]
    assert rows == alone["rows"] == [rows_for_step(80, STEPS.batch_rows, step, STEPS.seed) for step in range(10)]
    assert [step for step, _ in losses] == list(range(1, 11))
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in alone["losses"]], rel=1e-5)


def test_a_sharded_teacher_trains_the_same_student(done):
    for rank in range(2):
        whole, split = _saw(done, "replicated", rank), _saw(done, "split", rank)
        assert split["losses"] == whole["losses"]
        assert (split["gradients"], whole["gradients"]) == (0, 0)
        # also with a sharded student
        assert _saw(done, "both", rank)["losses"] == _saw(done, "whole", rank)["losses"]
    teacher = whole["teacher"]
    outside = 300 * 48 + 48  # the tied embedding and the last norm
    parts = [_saw(done, "split", rank)["teacher"] - outside for rank in range(2)]
    assert sum(parts) == teacher - outside
    assert max(parts) < 1.2 * min(parts)


def test_benchmarks_during_training_do_not_change_it_and_are_the_same_in_every_process(done, material):
    """With a sharded student, whose curve is compared above, and with one process."""
    found = [_saw(done, "both", rank)["scores"] for rank in range(2)]
    assert found[0] == found[1]
    assert [list(scores) for scores in found[0]] == [
        [f"task_arc_easy.{name}" for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "documents")]
    ] * 3
    config = replace(STEPS, checkpoint_every=0)
    plain, student = train(material, config)
    asked, other = train(material, config, tasks=True)
    assert asked["losses"] == plain["losses"]
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))
    assert len(asked["scores"]) == 3


class Counted(Rows):
    """Rows that record which of them are read."""

    read: list[int]

    def take(self, indices):
        self.read += list(indices)
        return super().take(indices)


@pytest.mark.parametrize("step", [3, 250_000])
def test_resuming_at_a_late_step_does_not_read_or_draw_more_than_at_an_early_one(material, tmp_path, step):
    config = replace(CONFIG, steps=step + 1)  # 4 rows each: sample 12, and sample 10^6
    student = pruned_student(material)
    state = TrainingState([(name, p) for name, p in student.named_parameters() if p.requires_grad], config)
    with Checkpoints(str(tmp_path), key="k") as saver:
        saver.save(step, state.tensors(), {"skipped": 0})
    assert committed_steps(str(tmp_path)) == [step]
    rows = Counted.open(str(material / "rows"), "train")
    rows.read, steps = [], []
    _permutation.cache_clear()
    targets = live_teacher(material)
    distill(student, targets, rows, config, checkpoints=str(tmp_path), key="k", report=steps.append)
    assert [report.step for report in steps] == [step + 1]
    assert rows.read == rows_for_step(80, 4, step, config.seed)
    assert _permutation.cache_info().misses == 1

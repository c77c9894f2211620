"""Checkpoints of one process; test_sharding.py tests those of several."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest
import torch

from minitron import storage
from minitron.distill.checkpoints import Checkpoints, committed_steps
from minitron.distill.curve import Curve, Point, read_curve
from minitron.errors import StorageError


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def _state(value):
    return {"master.a": torch.full((3, 4), value), "exp_avg.b": torch.full((5,), -value)}


def test_a_checkpoint_has_the_saved_values_even_if_training_continues_during_the_write(folder):
    state = _state(1.0)
    with Checkpoints(folder, key="k") as saver:
        for step in (3, 6, 9):
            saver.save(step, state, {"skipped": step // 6})
            for tensor in state.values():
                tensor.add_(torch.sign(tensor))  # while it is being written
    assert committed_steps(folder) == [6, 9]
    for step in committed_steps(folder):
        storage.verify(storage.join(folder, f"step-{step:08d}"))
    found = _state(0.0)
    with Checkpoints(folder, key="k") as saver:
        assert saver.load(found) == {"step": 9, "key": "k", "skipped": 1}
    assert all(torch.equal(found[name], value) for name, value in _state(3.0).items())
    with Checkpoints(folder, key="other") as saver:
        assert saver.load(found) is None


def test_a_checkpoint_of_the_same_step_is_replaced(folder):
    for value in (1.0, 2.0):
        with Checkpoints(folder, key="k") as saver:
            saver.save(3, _state(value), {})
    found = _state(0.0)
    with Checkpoints(folder, key="k") as saver:
        saver.load(found)
    assert all(torch.equal(found[name], value) for name, value in _state(2.0).items())


def test_a_forbidden_write_commits_and_removes_nothing(folder):
    with Checkpoints(folder, key="k") as saver:
        saver.save(3, _state(1.0), {})
        saver.save(6, _state(2.0), {})

    def forbid():
        raise StorageError("taken over")

    saver = Checkpoints(folder, key="k", keep=1, before_commit=forbid)
    with pytest.raises(StorageError, match="taken over"), saver:
        saver.save(6, _state(3.0), {})
    assert committed_steps(folder) == [3, 6]
    found = _state(0.0)
    with Checkpoints(folder, key="k") as saver:
        saver.load(found)
    assert torch.equal(found["master.a"], _state(2.0)["master.a"])


@pytest.mark.parametrize("note", ["later", {"key": "k"}, {"key": "k", "step": "3"}, None])
def test_folders_that_are_not_checkpoints_are_skipped(folder, note):
    with Checkpoints(folder, key="k") as saver:
        saver.save(3, _state(1.0), {})
    storage.write_bytes(f"{folder}/step-last/manifest.json", b"{}")
    storage.write_json(f"{folder}/step-00000006/manifest.json", {"files": {}, "note": note})
    found = _state(0.0)
    with Checkpoints(folder, key="k") as saver:
        assert saver.load(found)["step"] == 3
    assert torch.equal(found["master.a"], _state(1.0)["master.a"])


def test_the_training_curve_is_complete_after_any_resume(folder):
    def train(after, saved, killed):
        curve = Curve(folder)
        curve.resume(after)
        for step in range(after + 1, killed + 1):
            curve.add(Point(step, loss=killed + step / 7, kl=None))
            if step in saved:
                curve.save(step)

    train(0, saved={4, 8}, killed=10)
    train(4, saved={6}, killed=7)  # the checkpoint of step 8 was damaged, and checkpoints are more frequent now
    train(6, saved={8, 11}, killed=11)
    killed_at = [10] * 4 + [7] * 2 + [11] * 5
    assert read_curve(folder) == [Point(step, at + step / 7, None) for step, at in enumerate(killed_at, start=1)]
    assert committed_steps(folder) == []
    stray = Curve(folder)
    stray.resume(11)
    stray._saved = 9  # a process that was taken over, with checkpoints at other steps
    stray.add(Point(10, loss=killed_at[9] + 10 / 7, kl=None))
    stray.save(10)
    assert [point.step for point in read_curve(folder)] == list(range(1, 12))


def test_a_checkpoint_with_a_missing_tensor_is_named(tmp_path):
    with Checkpoints(str(tmp_path), key="k") as saver:
        saver.save(3, _state(1.0), {})
        saver.wait()
        with pytest.raises(StorageError, match=r"step-00000003: .*exp_avg\.c"):
            saver.load({**_state(0.0), "exp_avg.c": torch.zeros(2)})


FULL = """
import resource, sys, torch
from minitron.distill.checkpoints import Checkpoints
from minitron.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as if the disk were full after 100 kB
with Checkpoints(sys.argv[1], key="k") as saver:
    saver.save(3, {"a": torch.zeros(10)}, {})
    saver.save(6, {"a": torch.zeros(100_000)}, {})
    try:
        saver.save(9, {"a": torch.zeros(10)}, {})
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_is_reported_by_the_next_save_and_the_last_checkpoint_is_kept(tmp_path):
    result = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert "step-00000006: the disk is full" in result.stdout, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]

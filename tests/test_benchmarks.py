"""The benchmarks' trainings take turns, each in its own process; stalls are measured in the loop itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_distill import CONFIG, _stored, _student, material  # noqa: F401 (material is a fixture)

from benchmarks.stalls import UNDISTURBED_STEPS, Stalls
from benchmarks.workers import Finished, Worker
from minitron.data import Rows
from minitron.distill import distill
from minitron.distill.checkpoint import Checkpoints, committed_steps
from minitron.distill.state import TrainingState

TRAINING = """
from benchmarks.workers import Finished, Turns
turns = Turns(warm_up=2, steps=3)
print("what a trainer prints")
try:
    for step in range(1, {steps} + 1):
        turns.stepped({{"step": step, "loss": 7.0 - step if step > 1 else None}})
except Finished:
    print("asked no more")
"""


def _worker(folder: Path, steps: int) -> Worker:
    return Worker([sys.executable, "-c", TRAINING.format(steps=steps)], folder / "log")


def test_a_training_waits_until_it_is_asked_for_its_next_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    worker = _worker(tmp_path, steps=100)
    answers = [worker.turn(), worker.turn()]
    worker.close()
    assert [answer["step"] for answer in answers] == [5, 8]
    assert {answer["first_loss"] for answer in answers} == {5.0}
    assert (tmp_path / "log").read_text().splitlines() == ["what a trainer prints", "asked no more"]


def test_a_training_that_ends_early_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    worker = _worker(tmp_path, steps=4)
    with pytest.raises(RuntimeError, match="what a trainer prints"):
        worker.turn()


def test_stalls_save_in_turns_waited_for_and_not(material, tmp_path: Path) -> None:  # noqa: F811
    config = replace(CONFIG, steps=10_000)
    student, folder = _student(material), str(tmp_path / "checkpoints")
    tensors = TrainingState(list(student.named_parameters()), config).tensors()
    rows = Rows.open(str(material / "rows"), "train")
    with Checkpoints(folder, key="") as checkpoints:
        stalls = Stalls(checkpoints, tensors, rounds=2)
        with pytest.raises(Finished):
            distill(student, _stored(material), rows, config, report=stalls)
    assert len(stalls.waited) == len(stalls.returned) == len(stalls.lost) == 2
    assert len(stalls.undisturbed) == 2 * UNDISTURBED_STEPS
    last = stalls.reports[-1].step
    assert committed_steps(folder)[-1] == last  # that which was waited for
    assert len(stalls.reports) > len(stalls.undisturbed)  # steps went on beside the writing

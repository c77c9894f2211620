"""The benchmarks' trainings take turns, each in its own process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.workers import Worker

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

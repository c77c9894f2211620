"""Models are measured in turns, ratios are those of the same round, and what does not fit is reported."""

from __future__ import annotations

import pytest
import torch

from minitron.errors import InputError
from minitron.throughput import Request, Spread, Workload, measure


class Played:
    """An engine whose batches last `seconds`, of which the first token takes a quarter."""

    kind = "transformers"
    longest = 100

    def __init__(self, name, log, seconds, largest=8):
        self.name, self.log, self.seconds, self.largest = name, log, list(seconds), largest

    def warm_up(self, workload):
        if workload.batch > self.largest:
            raise torch.OutOfMemoryError
        self.log.append(f"{self.name} warm")

    def run(self, workload, seed):
        self.log.append(f"{self.name} {seed}")
        last = self.seconds[seed - 1]
        return [Request(workload.input_tokens, workload.output_tokens, last / 4, last)] * workload.batch

    def memory(self):
        return 7


def test_models_take_turns_and_a_ratio_is_that_of_one_round():
    log = []
    # the machine is half as fast in the last two rounds, which no ratio shows
    engines = {"teacher": Played("teacher", log, [4, 8, 8]), "student": Played("student", log, [2, 4, 4])}
    teacher, student = measure(engines, [Workload(30, 4, batch=2)], rounds=3)
    assert log == [
        "teacher warm",
        "student warm",
        *(f"{name} {n}" for n in (1, 2, 3) for name in ("teacher", "student")),
    ]
    assert student.ratio == Spread(2, 2, 2)
    assert teacher.ratio is None
    assert teacher.requests_per_second == Spread(2 / 8, 2 / 8, 3 / 8)
    assert teacher.output_tokens_per_second == Spread(1, 1, 1.5)
    assert teacher.tokens_per_second.median == 2 * 34 / 8
    assert teacher.first_token_seconds == Spread(2, 1.5, 2)
    assert teacher.inter_token_seconds.median == (8 - 2) / 3
    assert teacher.memory_bytes == 7


def test_a_batch_that_does_not_fit_is_a_failure_of_that_model_alone():
    engines = {"teacher": Played("teacher", [], [1], largest=1), "student": Played("student", [], [1])}
    results = measure(engines, [Workload(3, 4, batch=1), Workload(3, 4, batch=2)], rounds=1)
    assert [each.failure for each in results] == [None, None, "out of memory", None]
    assert results[2].requests_per_second is None
    assert results[3].ratio is None  # there is nothing to compare with
    assert results[3].requests_per_second.median == 2


def test_a_workload_beyond_a_context_is_refused_before_anything_runs():
    log = []
    with pytest.raises(InputError, match=r"student: 90 \+ 11 tokens exceed its context of 100"):
        measure({"student": Played("student", log, [1])}, [Workload(3, 4), Workload(90, 11)])
    assert not log
    with pytest.raises(InputError, match="less than 1"):
        Workload(0, 4)

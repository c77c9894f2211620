"""The estimated time left is that of the last minute's speed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from minitron_platform.console import Console


@pytest.fixture
def counting(monkeypatch):
    """The clock, what was shown, and a counter of documents."""
    now = [0.0]
    monkeypatch.setattr("minitron_platform.console.time", SimpleNamespace(monotonic=lambda: now[0]))
    console = Console()
    shown: list[str] = []
    monkeypatch.setattr(console, "status", shown.append)
    return now, shown, console.counter("documents")


def test_what_an_interrupted_run_had_finished_does_not_shorten_the_time_left(counting):
    now, shown, count = counting
    for done in range(1, 601):  # read from a storage, at once
        count(done, 1_000)
    for done in range(601, 621):  # 10 seconds each
        now[0] += 10
        count(done, 1_000)
    assert shown[0] == "1/1,000 documents"
    assert shown[-1] == "620/1,000 documents · 1 h 03 min left"
    count(1_000, 1_000)
    assert shown[-1] == "1,000/1,000 documents"


def test_a_batch_whose_documents_come_at_once_says_nothing_of_the_time_left(counting):
    now, shown, count = counting
    for done in range(1, 17):  # two batches of 16 seconds
        now[0] += 0.01 if done % 8 else 16
        count(done, 64)
        if done == 7:
            assert shown[-1] == "7/64 documents"
    assert shown[-1] == "16/64 documents · 1 min 43 s left"


def test_work_that_began_again_is_timed_from_its_new_beginning(counting):
    now, shown, count = counting
    for done in (1, 90, 1, 91):  # its worker has died after 90
        now[0] += 9
        count(done, 100)
    assert shown[-1] == "91/100 documents · 1 s left"

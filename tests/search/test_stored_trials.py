"""What the driver of a large search asks of its storage, and keeps in memory."""

from __future__ import annotations

import tracemalloc
import uuid
from collections import Counter

import fsspec
import pytest

from minitron.architecture import Architecture
from minitron_search.ranking import rank
from minitron_search.stability import stability
from minitron_search.stored_trials import StoredTrials
from minitron_search.tau import kendall_tau
from minitron_search.trial_store import (
    ForwardScore,
    RungResult,
    TrialResult,
    write_forward_score,
    write_result,
    write_rung,
)

RUNG, ROWS = 2, 512


def _shapes(count):
    return [Architecture(2, 64, 96 + 8 * number, 4, 2, 16, 300, True) for number in range(count)]


def _finish(folder, architecture, rungs=(RUNG,), rows=4):
    """Store a finished trial; the larger, the better."""
    kl = 1e5 / architecture.num_parameters
    write_forward_score(folder, architecture, ForwardScore(kl + 1, kl + 2))
    for step in rungs:
        write_rung(folder, architecture, RungResult(step, kl + 0.5, kl + 1, (kl,) * rows))
    result = TrialResult(
        architecture=architecture,
        parameters=architecture.num_parameters,
        kl_undistilled=kl + 1,
        loss_undistilled=kl + 2,
        rung_kl=dict.fromkeys(rungs, kl + 0.5),
        kl=kl,
        loss=kl + 1,
        top1_agreement=0.5,
        per_row_kl=tuple(kl + row / 1e3 for row in range(rows)),
        tokens=1,
        config={"steps": 4},
        seconds=1.0,
    )
    write_result(folder, result)


@pytest.fixture
def requests(monkeypatch):
    """Counts what is asked of a storage in memory, by the method."""
    counts = Counter()
    kind = type(fsspec.filesystem("memory"))

    def counted(name, method):
        def call(*arguments, **options):
            counts[name] += 1
            return method(*arguments, **options)

        return call

    for name in ("find", "cat_file", "exists"):
        monkeypatch.setattr(kind, name, counted(name, getattr(kind, name)))
    return counts


def test_a_storage_is_listed_once_and_asked_only_for_files_that_exist_each_once(requests):
    folder, shapes = f"memory://{uuid.uuid4().hex}/trials", _shapes(40)
    for architecture in shapes[:10]:
        _finish(folder, architecture)
    requests.clear()
    stored = StoredTrials(folder)
    for _ in range(3):
        assert list(stored.results(shapes, (RUNG,))) == shapes[:10]
        assert list(stored.rung_kl(shapes, RUNG)) == list(stored.rung_kl(shapes, 0)) == shapes[:10]
        assert stored.rung_kl(shapes, RUNG + 1) == {}
    assert (requests["find"], requests["cat_file"], requests["exists"]) == (1, 3 * 10, 0)

    _finish(folder, shapes[20])
    assert list(stored.results(shapes, (RUNG,))) == shapes[:10]  # as it was when it was listed
    stored.refresh()
    assert list(stored.results(shapes, (RUNG,))) == [*shapes[:10], shapes[20]]
    assert (requests["find"], requests["cat_file"]) == (2, 3 * 10 + 1)


def test_a_trial_that_is_repeated_for_another_rung_is_read_again(tmp_path):
    folder, (architecture,) = str(tmp_path), _shapes(1)
    _finish(folder, architecture)
    stored = StoredTrials(folder)
    assert stored.results([architecture], (RUNG, 3)) == {}
    _finish(folder, architecture, rungs=(RUNG, 3))
    assert stored.results([architecture], (RUNG, 3))[architecture].rung_kl.keys() == {RUNG, 3}


def test_ten_thousand_results_on_512_rows_take_less_than_100_megabytes(tmp_path):
    shapes = _shapes(20)
    for architecture in shapes:
        _finish(str(tmp_path), architecture, rows=ROWS)
    tracemalloc.start()
    results = list(StoredTrials(str(tmp_path)).results(shapes).values())
    ranking = rank(results, 8)
    stability(results, (RUNG,))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(ranking) == len(shapes)
    assert kept / len(shapes) * 10_000 < 0.1e9  # 41 MB of them are the KL of the rows


def test_the_agreement_of_two_orders_does_not_keep_all_pairs():
    values = [float((number * 7919) % 2000) for number in range(2000)]
    tracemalloc.start()
    assert kendall_tau(values, values) == 1
    assert kendall_tau(values, [-value for value in values]) == -1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
    assert kendall_tau([1, 2, 2, 3], [1, 3, 2, 2]) == pytest.approx(2 / 6)  # ties count as neither

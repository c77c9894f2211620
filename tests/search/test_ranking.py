"""The ranking of a search: ties, the cheapest of the tied candidates, and the sentence that explains the choice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minitron import Architecture
from minitron_search.ranking import rank, reason, t_quantile, winner_of
from minitron_search.trial_store import TrialResult

BASE = Architecture(8, 64, 128, 8, 2, 8, 300, True)
ROWS = np.random.default_rng(0).normal(1.0, 0.3, 40)  # rows differ much more than candidates do


def _result(per_row_kl, **shape):
    architecture = replace(BASE, **shape)
    return TrialResult(
        architecture=architecture,
        parameters=architecture.num_parameters,
        kl_undistilled=2.0,
        loss_undistilled=3.0,
        rung_kl={},
        kl=float(np.mean(per_row_kl)),
        loss=3.0,
        top1_agreement=0.5,
        per_row_kl=tuple(map(float, per_row_kl)),
        tokens=100,
        config={"steps": 4},
        seconds=1.0,
    )


def _noise(seed, size=0.02):
    return np.random.default_rng(seed).normal(0, size, 40)


def test_a_clearly_worse_candidate_loses_even_if_it_is_cheaper():
    ranking = rank([_result(ROWS + 0.2 + _noise(1), num_layers=2), _result(ROWS)], 64)
    assert [candidate.tied for candidate in ranking] == [True, False]
    assert [candidate.winner for candidate in ranking] == [True, False]
    assert [candidate.rank for candidate in ranking] == [1, 2]
    assert ranking[0].architecture == BASE
    assert reason(ranking) == "lowest held-out KL, at 95% confidence"


def test_the_cheapest_of_the_tied_candidates_wins_and_the_reason_says_so():
    near, nearer = ROWS + 0.002 + _noise(1), ROWS + 0.001 + _noise(2)
    ranking = rank([_result(ROWS), _result(near, num_layers=4), _result(nearer, num_layers=6)], 64)
    assert all(candidate.tied for candidate in ranking)
    winner = winner_of(ranking)
    assert winner.architecture.num_layers == 4
    assert winner.rank > 1
    sentence = reason(ranking)
    assert sentence.startswith("3 candidates can't be told apart")
    assert f"{winner.kl_difference:.3f} ± {winner.kl_difference_stderr:.3f} above the lowest" in sentence
    assert f"{winner.parameters:,} parameters" in sentence


def test_tied_candidates_are_ordered_by_flops_at_the_sequence_length_of_the_run():
    # many layers with few heads cost more in short sequences, many heads in long ones
    deep, wide = {"num_layers": 8, "num_heads": 4}, {"num_layers": 6, "num_heads": 8}
    results = [_result(ROWS, **deep), _result(ROWS + _noise(1), **wide)]
    for length in (8, 4096):
        flops = [replace(BASE, **shape).flops_per_token(length) for shape in (deep, wide)]
        assert winner_of(rank(results, length)).flops_per_token == min(flops)
    assert {winner_of(rank(results, length)).architecture.num_layers for length in (8, 4096)} == {6, 8}


def test_differences_are_paired_by_row():
    _, second = rank([_result(ROWS), _result(ROWS + 0.05 + _noise(3))], 64)
    differences = _noise(3) + 0.05
    assert second.kl_difference == pytest.approx(differences.mean())
    assert second.kl_difference_stderr == pytest.approx(differences.std(ddof=1) / 40**0.5)
    assert not second.tied  # although the rows themselves vary six times as much


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (11, 2.201), (30, 2.042), (10_000, 1.960)],
)
def test_t_quantiles_are_the_published_ones(freedom, published):
    assert t_quantile(freedom) == pytest.approx(published, rel=0.01)


def test_the_same_difference_ties_on_few_rows_and_not_on_many():
    spread = np.array([-1.0, 0.0, 1.0])  # scaled to 2.2 standard errors above zero with 3 rows and with 48
    for copies, tied in ((1, True), (16, False)):
        noise = np.tile(spread, copies)
        above = 2.2 * noise.std(ddof=1) / len(noise) ** 0.5
        rows = np.ones(len(noise))
        best, second = rank([_result(rows), _result(rows + above + noise, num_layers=2)], 64)
        assert second.kl_difference / second.kl_difference_stderr == pytest.approx(2.2)
        assert (best.tied, second.tied) == (True, tied)


def test_the_reason_says_if_there_was_one_candidate_or_one_row():
    assert "only candidate" in reason(rank([_result(ROWS)], 64))
    ranking = rank([_result([1.0]), _result([1.01], num_layers=2)], 64)
    assert [candidate.tied for candidate in ranking] == [True, False]
    assert ranking[1].kl_difference_stderr is None
    assert "one held-out row" in reason(ranking)

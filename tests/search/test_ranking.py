"""The ranking of a search: who can't be told apart, who is cheapest of them, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minitron import Architecture
from minitron_search.ranking import rank, reason, t_quantile

BASE = Architecture(8, 64, 128, 8, 2, 8, 300, True)
ROWS = np.random.default_rng(0).normal(1.0, 0.3, 40)  # rows differ much more than candidates do


def _result(per_row_kl, **shape):
    architecture = replace(BASE, **shape)
    return {
        "architecture": architecture.to_dict(),
        "parameters": architecture.num_parameters,
        "per_row_kl": list(per_row_kl),
        "kl": float(np.mean(per_row_kl)),
        "kl_undistilled": 2.0,
        "loss": 3.0,
        "top1_agreement": 0.5,
        "tokens": 100,
        "seconds": 1.0,
    }


def _noise(seed, size=0.02):
    return np.random.default_rng(seed).normal(0, size, 40)


def test_what_is_clearly_worse_loses_however_cheap():
    table = rank([_result(ROWS + 0.2 + _noise(1), num_layers=2), _result(ROWS)], 64)
    assert table["tied"].tolist() == [True, False]
    assert table["winner"].tolist() == [True, False]
    assert table.iloc[0]["architecture"] == str(BASE)
    assert reason(table) == "lowest held-out KL, at 95% confidence"


def test_of_those_that_cannot_be_told_apart_the_cheapest_wins_and_it_is_said():
    near, nearer = ROWS + 0.002 + _noise(1), ROWS + 0.001 + _noise(2)
    table = rank([_result(ROWS), _result(near, num_layers=4), _result(nearer, num_layers=6)], 64)
    assert table["tied"].all()
    winner = table[table["winner"]].iloc[0]
    assert winner["num_layers"] == 4
    assert winner["rank"] > 1
    said = reason(table)
    assert said.startswith("3 candidates can't be told apart")
    assert f"{winner['kl_difference']:.3f} ± {winner['kl_difference_stderr']:.3f} above the lowest" in said
    assert f"{winner['parameters']:,} parameters" in said


def test_flops_decide_at_the_length_of_the_run_then_parameters():
    # more layers with fewer heads: attention makes the one dearer in long sequences, the other in short ones
    deep, wide = {"num_layers": 8, "num_heads": 4}, {"num_layers": 6, "num_heads": 8}
    results = [_result(ROWS, **deep), _result(ROWS + _noise(1), **wide)]
    for length in (8, 4096):
        table = rank(results, length)
        flops = [replace(BASE, **shape).flops_per_token(length) for shape in (deep, wide)]
        assert table[table["winner"]].iloc[0]["flops_per_token"] == min(flops)
    assert {int(rank(results, length).query("winner")["num_layers"].iloc[0]) for length in (8, 4096)} == {6, 8}


def test_differences_are_paired_by_row():
    table = rank([_result(ROWS), _result(ROWS + 0.05 + _noise(3))], 64)
    differences = _noise(3) + 0.05
    assert table.iloc[1]["kl_difference"] == pytest.approx(differences.mean())
    assert table.iloc[1]["kl_difference_stderr"] == pytest.approx(differences.std(ddof=1) / 40**0.5)
    assert not table.iloc[1]["tied"]  # though the rows' own spread is six times the difference


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (11, 2.201), (30, 2.042), (10_000, 1.960)],
)
def test_few_rows_need_more_standard_errors(freedom, published):
    assert t_quantile(freedom) == pytest.approx(published, rel=0.01)


def test_the_same_difference_ties_on_few_rows_and_not_on_many():
    spread = np.array([-1.0, 0.0, 1.0])  # 2.2 standard errors above zero with 3 rows and with 48
    for copies, tied in ((1, True), (16, False)):
        noise = np.tile(spread, copies)
        above = 2.2 * noise.std(ddof=1) / len(noise) ** 0.5
        rows = np.ones(len(noise))
        table = rank([_result(rows), _result(rows + above + noise, num_layers=2)], 64)
        assert table.iloc[1]["kl_difference"] / table.iloc[1]["kl_difference_stderr"] == pytest.approx(2.2)
        assert table["tied"].tolist() == [True, tied]


def test_one_candidate_or_one_row_is_said():
    assert "only candidate" in reason(rank([_result(ROWS)], 64))
    table = rank([_result([1.0]), _result([1.01], num_layers=2)], 64)
    assert table["tied"].tolist() == [True, False]
    assert "one held-out row" in reason(table)

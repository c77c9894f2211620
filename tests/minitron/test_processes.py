"""Two processes that share the rows, requests and weights give the results of one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import tiny
from helpers.command import ROOT
from helpers.evaluating import tiny_model
from helpers.measure_together import calibrate_all, evaluate_all

from minitron import ImportanceScores


@pytest.fixture(scope="module")
def together(bench, tmp_path_factory):
    """A folder with what each of two processes measured."""
    folder = tmp_path_factory.mktemp("together")
    arguments = [sys.executable, "-m", "helpers.measure_together", str(bench), str(folder)]
    processes = [subprocess.Popen([*arguments, str(rank), "2"], cwd=ROOT / "tests") for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return folder


def test_two_processes_calibrate_like_one(bench, together, tmp_path):
    """For every family, with rows that do not divide evenly, and with a process that gets no rows."""
    calibrate_all(bench, f"{tmp_path}/{{}}")
    alone = sorted(tmp_path.iterdir())
    assert len(alone) == len(tiny.FAMILIES) + 2
    for file in alone:
        one = ImportanceScores.load(file)
        first, second = (ImportanceScores.load(together / f"{file.name}.{rank}of2") for rank in (0, 1))
        assert first.orders == second.orders == one.orders
        for name in ("heads", "neurons", "channels", "similarity", "experts"):
            values = [getattr(scores, name) for scores in (one, first, second)]
            if values[0] is not None:
                assert torch.equal(values[1], values[2])
                assert torch.allclose(values[0], values[1], rtol=1e-5, atol=1e-6), (file.name, name)
        assert {m: set(sizes) for m, sizes in one.removal.items()} == {m: set(s) for m, s in first.removal.items()}
        for metric, sizes in one.removal.items():
            for size, values in sizes.items():
                assert torch.equal(first.blocks(size, metric), second.blocks(size, metric))
                assert torch.allclose(values, first.blocks(size, metric), rtol=1e-5, atol=1e-6)


def test_two_processes_share_the_requests_of_benchmarks_and_score_like_one(together, tmp_path):
    alone = evaluate_all(tiny_model(1), tmp_path)
    results = [json.loads((together / f"evaluate.json.{rank}of2").read_text()) for rank in (0, 1)]
    for result in results:
        assert result["scores"] == json.loads(json.dumps(alone["scores"]))  # to the last digit
        assert result["counts"][-1] == [21, 21]
    assert sum(result["passes"] for result in results) == alone["passes"]

"""Two processes that share the rows, requests and weights give the results of one."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import tiny
from helpers.command import ROOT, environment
from helpers.counting import Counting
from helpers.evaluating import tiny_model
from helpers.measure_together import SCORINGS, calibrate_all, evaluate_all, measure_all
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitron import ImportanceScores, estimate_importance
from minitron.distill import loading
from minitron.distill.teacher.shard_writing import default_shard_bytes
from minitron.models import load_model
from minitron.processes import wait_for_all


@pytest.fixture(scope="module")
def together(bench, material, tmp_path_factory):
    """A folder with what each of two processes measured."""
    folder = tmp_path_factory.mktemp("together")
    arguments = [sys.executable, "-m", "helpers.measure_together", str(bench), str(material), str(folder)]
    subprocess.run(arguments, cwd=ROOT / "tests", env=environment(), check=True, timeout=300)
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
        _same_importance(one, first)
        _same_importance(first, second, exactly=True)


def _same_importance(first, other, *, exactly=False):
    same = torch.equal if exactly else partial(torch.allclose, rtol=1e-5, atol=1e-6)
    for name in ("heads", "neurons", "channels", "similarity", "experts"):
        if getattr(first, name) is not None:
            assert same(getattr(first, name), getattr(other, name)), name
    assert first.orders == other.orders
    assert {m: set(sizes) for m, sizes in first.removal.items()} == {m: set(s) for m, s in other.removal.items()}
    for metric, sizes in first.removal.items():
        for size, values in sizes.items():
            assert same(values, other.blocks(size, metric))


def test_a_model_that_is_split_over_two_processes_is_measured_like_a_whole_one(material, together, tmp_path):
    """Its importance, stored outputs, held-out metrics, and answers and texts of benchmarks, each in uneven parts."""
    alone = measure_all(load_model(material / "teacher"), material, tmp_path / "alone", tmp_path / "store")
    results = [json.loads((together / f"split.json.{rank}of2").read_text()) for rank in (0, 1)]
    for rank, result in enumerate(results):
        _same_importance(
            ImportanceScores.load(together / f"split-{rank}of2" / "scores"),
            ImportanceScores.load(tmp_path / "alone" / "scores"),
        )
        assert result["scores"] == json.loads(json.dumps(alone["scores"]))  # to the last digit
        assert result["heldout"] == json.loads(json.dumps(alone["heldout"]))
    assert [result["rows"] for result in results] == [12, 8]  # of three shards
    for number in range(3):
        file = f"shard-0000{number}/rows.safetensors"
        assert (together / "split-store" / file).read_bytes() == (tmp_path / "store" / file).read_bytes()
    mixture = estimate_importance(tiny.model("mixtral", seed=3), tiny.rows(3), layers=SCORINGS[0])
    _same_importance(ImportanceScores.load(together / "split-mixture.1of2"), mixture)


def test_two_processes_share_the_requests_of_benchmarks_and_score_like_one(together, tmp_path):
    alone = evaluate_all(tiny_model(1), tmp_path)
    results = [json.loads((together / f"evaluate.json.{rank}of2").read_text()) for rank in (0, 1)]
    for result in results:
        assert result["scores"] == json.loads(json.dumps(alone["scores"]))  # to the last digit
        assert result["counts"][-1] == [26, 26]
    # each of them computes what the questions of a task begin with
    assert sum(result["passes"] for result in results) == alone["passes"] + 1


@pytest.mark.parametrize("rank", [0, 1])
def test_requests_that_differ_between_processes_fail_their_task_in_all_of_them(together, rank):
    failed = json.loads((together / f"failed.json.{rank}of2").read_text())
    assert "the requests differ between the processes" in failed["arc_easy"]


def test_processes_of_a_node_load_a_model_that_is_converted_one_after_another(together):
    assert (together / "loads").read_text().splitlines() == ["begin 0", "end 0", "begin 1", "end 1"]


def test_models_are_split_if_they_take_more_than_four_fifths_of_the_free_memory_of_any_gpu(material, monkeypatch):
    size = 4 * sum(parameter.numel() for parameter in load_model(material / "teacher").parameters())
    monkeypatch.setattr(loading, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(loading, "world_size", lambda: 2)
    for free, others, whole in ((1.3 * size, 0, True), (1.2 * size, 0, False), (1.3 * size, 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (int(free), int(2 * free)))
        monkeypatch.setattr(loading, "largest", lambda own, others=others: [max(*own, others)])
        assert loading.fit_whole([material / "teacher"], torch.float32) is whole
    monkeypatch.setattr(loading, "world_size", lambda: 1)
    assert loading.fit_whole([material / "teacher"], torch.float32)


def test_processes_wait_for_each_other_by_a_tensor_that_is_on_their_own_gpu():
    dist.init_process_group("fake", rank=6, world_size=10, store=FakeStore())
    try:
        with Counting() as sent:
            wait_for_all()
    finally:
        dist.destroy_process_group()
    assert sent.calls["c10d.allreduce_.default"] == 1
    assert sent.calls["c10d.barrier.default"] == 0  # whose GPU is guessed


def test_a_small_store_has_a_shard_for_each_process():
    assert default_shard_bytes(10 << 30, 1) == default_shard_bytes(10 << 30, 8) == 256 << 20
    assert default_shard_bytes(512 << 20, 8) == 64 << 20
    assert default_shard_bytes(1 << 20, 8) == 4 << 20

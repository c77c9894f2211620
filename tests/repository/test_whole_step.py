"""The benchmark of whole steps, on a CPU with tiny models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.settings import Settings
from benchmarks.step_results import About, Outcome, columns_of
from benchmarks.trainers import OURS, OURS_LIVE
from benchmarks.whole_step import main
from benchmarks.workers import EndedEarly, Worker

ROOT = Path(__file__).resolve().parents[2]
# The measuring process may not load a model: what it had on a GPU would be missing to the trainers.
WITHOUT_MODELS = """
import sys
from transformers import PreTrainedModel
from benchmarks.whole_step import main
def refuse(*_, **__): raise AssertionError("a model in the measuring process")
PreTrainedModel.__init__ = refuse
main(sys.argv[1:])
"""


@pytest.mark.long
def test_the_command_compares_trainers_without_a_model_in_its_own_process(tmp_path):
    options = [
        "--shapes=tiny",
        "--sequence=32",
        "--batch=2",
        "--rows=4",
        "--warm-up=1",
        "--rounds=1",
        "--only=minitron, st",
    ]
    out = tmp_path / "table.md"
    command = [sys.executable, "-c", WITHOUT_MODELS, *options, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = out.read_text().splitlines()[-1].split(" | ")
    assert row[0] == f"| {OURS}"
    assert float(row[1].replace(",", "")) > 0
    assert row[2] == "1.00 (1.00 to 1.00)"
    assert float(row[4].removesuffix(" %")) > 0
    assert row[-1] == "2 rows, recompute none, adamw |"


@pytest.mark.parametrize(
    ("shapes", "first"),
    [
        ("llama-3b", "3.21B -> 2.01B, 28 layers"),
        ("llama-8b", "8.03B -> 4.51B, 32 layers"),
        ("llama-70b", "4.67B -> 2.86B, 3 layers"),
    ],
)
def test_settings_for_a_gpu_of_80_gb_follow_from_the_estimate(capsys, shapes, first):
    main(["--plan", "80", "--shapes", shapes, "--sequence", "4096", "--only", "minitron"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{shapes}: {first}"
    for name in (OURS, OURS_LIVE):
        line = next(line for line in lines if line.startswith(name))
        assert float(line.split("estimate ")[1].removesuffix(" GB")) <= 72
        assert ("adamw-offload" in line) == (shapes == "llama-8b")


@pytest.mark.parametrize(
    ("message", "out_of_memory"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", True),
        ("TypeError: an unexpected argument", False),
    ],
)
def test_a_trainer_that_runs_out_of_memory_is_told_from_one_that_fails(tmp_path, message, out_of_memory):
    with pytest.raises(EndedEarly, match=message.split(":")[0]) as raised:
        Worker([sys.executable, "-c", f"import sys; sys.exit({message!r})"], tmp_path / "log")
    assert raised.value.out_of_memory == out_of_memory


def test_a_trainer_without_memory_is_a_row_that_says_so_and_the_others_are_compared():
    answer = {"seconds": 2.0, "peak": 3e9, "first_loss": None, "parts": {"student": 3.0, "loss": 1.0, "data": 0.0}}
    outcomes = {
        OURS: Outcome(Settings(1, "none", estimate=4_000_000_000), [answer]),
        OURS_LIVE: Outcome(Settings(1, "full"), failure="out of memory"),
    }
    about = About("a GPU", 80, measured_flops=740e12, datasheet_flops=989e12, store_seconds=1)
    columns = columns_of(outcomes, 2000, dict.fromkeys(outcomes, 74_000_000_000), about)
    stored, live = ([column[name] for column in columns] for name in outcomes)
    assert stored[:5] == ["1,000", "1.00 (1.00 to 1.00)", "-", "7.5 %", "10.0 %"]
    assert stored[5:] == ["3.00 (estimate 4.0)", "student, 75 %", "-", "1 row, recompute none, adamw"]
    assert live == ["out of memory", *["-"] * 7, "1 row, recompute full, adamw"]

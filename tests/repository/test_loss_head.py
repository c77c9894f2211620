"""The benchmark of the logit loss, on a CPU with tiny sizes."""

from __future__ import annotations

from benchmarks.loss_head import main, memory_table
from benchmarks.loss_heads import OURS, REFERENCE
from benchmarks.loss_material import random_pair


def test_the_command_prints_errors_memory_and_times_for_named_sizes(tmp_path, monkeypatch):
    out = tmp_path / "tables.md"
    options = ["--shapes", "tiny", "--exact-tokens", "64", "--tokens", "16384", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["loss_head", *options])
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # would outlive this test
    main()
    error, memory, time = (line.split(" | ") for line in out.read_text().splitlines() if line.startswith(f"| {OURS} "))
    assert all(0 < float(value) < 1 for cell in error[1:] for value in cell.removesuffix(" |").split(" / "))
    assert float(memory[2].removesuffix(" |")) > 1
    assert float(time[2]) > 0
    assert "16,384 tokens, vocabulary 512, widths 64 and 64" in out.read_text()


def test_a_peak_too_small_to_measure_is_given_as_a_bound():
    lines = memory_table({OURS: 0, REFERENCE: 4_100_096}, random_pair("tiny", 4))
    assert f"| {OURS} | < 1 | - |" in lines
    assert f"| {REFERENCE} | 4 | 1.0 |" in lines

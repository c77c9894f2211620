"""FP8 products in trainings, which torchao emulates on CPUs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.graphs import counted_graphs

from minitron.distill import DistillConfig, LiveTeacher, Losses, distill
from minitron.distill.fp8 import check_fp8, fp8_linears
from minitron.errors import InputError
from minitron.models import final_hidden

CONFIG = DistillConfig(steps=6, batch_rows=4, micro_batch_rows=2, peak_lr=2e-3, warmup_steps=0)
KL, NEXT_TOKEN = Losses(), Losses(logits="none", cross_entropy=1.0)
CPU = torch.device("cpu")


class RandomRows:
    seq_length = 16

    def __len__(self):
        return 64

    def take(self, indices):
        return tiny.rows(64)[list(indices)]


def model(layers):
    return tiny.model(num_hidden_layers=layers, seed=layers).to(torch.bfloat16)


def distilled(config, teacher=None, losses=KL):
    """The loss by step."""
    student = model(3)
    reported = []
    targets = LiveTeacher(teacher) if teacher else None
    distill(student, targets, RandomRows(), config, losses=losses, report=lambda step: reported.append(step.loss))
    assert not any("forward" in vars(module) for made in (student, teacher) if made for module in made.modules())
    return reported


@pytest.mark.parametrize(
    ("package", "dtype", "seq_length", "capability", "problem", "remedy"),
    [
        (False, torch.bfloat16, 64, (9, 0), "the package torchao", r"minitron\[fp8\]"),
        (True, torch.bfloat16, 64, (8, 0), "compute capability 8.0, and FP8 products need 8.9", "Hopper"),
        (True, torch.float32, 64, None, "compute in float32", "bfloat16"),
        (True, torch.bfloat16, 100, None, "rows of 100 tokens", "multiple of 16"),
    ],
)
def test_fp8_is_refused_where_it_is_not_possible(package, dtype, seq_length, capability, problem, remedy, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package or None)
    with pytest.raises(InputError, match=problem) as refused:
        check_fp8(dtype, seq_length, capability)
    assert refused.match(f"(?s).*{remedy}")


def test_a_student_trained_with_fp8_comes_as_close_to_its_teacher_and_is_measured_in_its_own_dtype():
    student, teacher, rows = model(3), model(4), tiny.rows()
    with torch.no_grad():
        plain = final_hidden(student, rows)
        with fp8_linears(student, "rowwise", CPU, with_gradients=True):
            assert torch.equal(final_hidden(student, rows), plain)
        with fp8_linears(student, "rowwise", CPU, with_gradients=False):
            rounded = final_hidden(student, rows)
    assert 0.005 < (rounded - plain).float().norm() / plain.float().norm() < 0.1
    expected = distilled(CONFIG, teacher)
    assert expected[-1] < 0.9 * expected[0]
    for scaling in ("tensorwise", "rowwise"):
        losses = distilled(replace(CONFIG, fp8=scaling), teacher)
        assert losses != expected
        assert losses == pytest.approx(expected, rel=0.05)


def test_compiled_layers_with_fp8_share_a_graph_and_recompute_the_same(monkeypatch):
    graphs = counted_graphs(monkeypatch)
    config = replace(CONFIG, steps=2, fp8="rowwise")
    compiled = distilled(replace(config, compile=True, activation_checkpointing="selective"), losses=NEXT_TOKEN)
    assert compiled == distilled(config, losses=NEXT_TOKEN)
    assert len(graphs) == 1

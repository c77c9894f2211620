"""Moments of 8 bits, by torchao."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from helpers import tiny

from minitron.architecture import Architecture
from minitron.distill import DistillConfig, Losses, distill
from minitron.distill.gpu_memory import gpu_memory
from minitron.distill.low_bit import check_low_bit
from minitron.distill.state import TrainingState
from minitron.errors import InputError

PLAIN = DistillConfig(steps=6, batch_rows=4, micro_batch_rows=4, peak_lr=3e-3, warmup_steps=0)
CONFIG = replace(PLAIN, optimizer="adamw-8bit")


class RandomRows:
    seq_length = 16

    def __len__(self):
        return 16

    def take(self, indices):
        return tiny.rows(16)[list(indices)]


def distilled(config, **options):
    """The losses by step, and the student."""
    losses, student = [], tiny.model(num_hidden_layers=2)
    next_token = Losses(logits="none", cross_entropy=1.0)
    distill(
        student, None, RandomRows(), config, losses=next_token, report=lambda step: losses.append(step.loss), **options
    )
    return losses, list(student.parameters())


def test_moments_of_8_bits_train_alike_and_are_resumed_from(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # without C++
    losses, student = distilled(CONFIG)
    expected, _ = distilled(PLAIN)
    assert expected[-1] < 0.99 * expected[0]
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.01)
    checkpoints = {"checkpoints": str(tmp_path), "key": "k"}
    begun, _ = distilled(CONFIG, until=3, **checkpoints)
    rest, resumed = distilled(CONFIG, **checkpoints)
    assert begun + rest == losses
    assert all(torch.equal(a, b) for a, b in zip(student, resumed, strict=True))
    large = [(name, p) for name, p in tiny.model(num_hidden_layers=2).named_parameters() if p.numel() % 256 == 0]
    large = [(name, p) for name, p in large if p.numel() >= 4096]
    tensors = TrainingState(large, CONFIG).tensors()
    moments = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("master"))
    assert moments == 2 * sum(p.numel() for _, p in large) * (1 + 4 / 256)


def test_moments_of_8_bits_let_one_gpu_distil_8b_to_4_5b():
    student = Architecture(32, 3072, 9216, 32, 8, 128, 128_256, tied=False)
    teacher = Architecture(32, 4096, 14_336, 32, 8, 128, 128_256, tied=False)
    settings = replace(CONFIG, micro_batch_rows=1, activation_checkpointing="full")
    plain, low = (
        gpu_memory(student, replace(settings, optimizer=o), 8192, teacher=teacher) for o in ("adamw", "adamw-8bit")
    )
    assert low.peak < 64e9 < 80e9 < plain.peak
    assert low.moments == pytest.approx(plain.moments * (1 + 4 / 256) / 4, rel=1e-6)


def test_8_bits_are_refused_without_torchao_and_with_sharding(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="the package torchao"):
        check_low_bit()
    with pytest.raises(InputError, match="adamw-8bit with shard"):
        replace(CONFIG, shard=True)

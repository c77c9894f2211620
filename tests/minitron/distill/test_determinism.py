"""Deterministic kernels are asked for on GPUs alone, and for the time of a training."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from helpers.distilling import CONFIG, distil

from minitron.distill.determinism import deterministic_kernels


def test_deterministic_kernels_are_used_on_a_gpu_within_the_block(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_kernels(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(ZeroDivisionError), deterministic_kernels(torch.device("cuda")):
            raise ZeroDivisionError
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_deterministic_training_is_the_same_on_a_cpu(material):
    config = replace(CONFIG, steps=2)
    assert distil(material, replace(config, deterministic=True))[0] == distil(material, config)[0]

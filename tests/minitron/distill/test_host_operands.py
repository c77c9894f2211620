"""A micro-batch on a GPU takes no value from main memory, rehearsed on the device "meta"."""

from __future__ import annotations

import pytest
import torch
from helpers.host_operands import HostOperands
from helpers.meta_step import like_cuda, meta_model

from minitron.attention import interface, rows
from minitron.data import DocumentBoundaries
from minitron.distill import LiveTeacher, Losses
from minitron.distill.losses.objective import Objective

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 128}
FAMILIES = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {},
    "phi3": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "nemotron": {},
}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_micro_batch_takes_no_value_from_main_memory(family, separate, monkeypatch):
    monkeypatch.setattr(rows, "chosen_kernel", lambda device: "flex")
    monkeypatch.setattr(interface, "_fused", lambda query, key, value, **_: query * key.sum() * value.sum())
    attention = "eager" if family == "gemma2" else "sdpa"
    student, teacher = (meta_model(family, attention=attention, **SIZES, **FAMILIES[family]) for _ in range(2))
    documents = DocumentBoundaries(1) if separate else None
    targets = LiveTeacher(teacher, documents=documents)
    objective = Objective(student, targets, Losses(cross_entropy=0.5), documents=documents)
    tokens = torch.zeros(2, 256, dtype=torch.int64, device="meta")
    with like_cuda(), HostOperands() as taken:
        loss, _ = objective([0, 1], tokens)
        loss.backward()
    assert not taken.found

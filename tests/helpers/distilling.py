"""A small trained teacher, and the distillation of students that are pruned from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from helpers import tiny

from minitron import ImportanceScores, estimate_importance, prune
from minitron.data import Rows, TextSource, pack
from minitron.distill import DistillConfig, LiveTeacher, Losses, StoredTeacher, distill, store_hidden
from minitron.logits import Head
from minitron.models import load_model, load_tokenizer

CONFIG = DistillConfig(steps=12, batch_rows=4, micro_batch_rows=2, peak_lr=2e-3, min_lr=1e-4, warmup_steps=2)
# all intermediate losses, which share one projection that is trained with the student
CHANNELS = torch.arange(36)
INTERMEDIATE = Losses(
    cross_entropy=0.2, hidden=("last-2:last-2",), embedding=True, mlp_input=("1:1",), attention=("2:2",)
)


def make_material(folder: Path) -> Path:
    """Write a trained teacher, its rows, its stored hidden states and its importance scores to `folder`."""
    teacher = tiny.checkpoint(folder / "teacher")
    source = TextSource("jsonl", path=str(tiny.corpus(folder / "text.jsonl")))
    rows = pack(source, load_tokenizer(teacher), str(folder / "rows"), seq_length=32, train_rows=80, heldout_rows=8)
    model = load_model(teacher)
    store_hidden(lambda: model, rows, str(folder / "hidden"), key="k")
    scores = estimate_importance(model, rows.take(range(8)))
    scores.save(folder / "scores.safetensors")
    return folder


def load_teacher(folder):
    return load_model(folder / "teacher")


def pruned_student(folder):
    teacher = load_teacher(folder)
    target = replace(tiny.architecture(teacher), num_layers=4, hidden_size=36, intermediate_size=48)
    return prune(teacher, target, ImportanceScores.load(folder / "scores.safetensors"))


def stored_teacher(folder):
    return StoredTeacher(str(folder / "hidden"), Head.of(load_teacher(folder)), "k")


def live_teacher(folder):
    return LiveTeacher(load_teacher(folder))


def distil(folder, config=CONFIG, targets=None, **options):
    """Distil a student; returns the loss of each step and the student."""
    losses = []
    student = distill(
        pruned_student(folder),
        targets or stored_teacher(folder),
        Rows.open(str(folder / "rows"), "train"),
        config,
        report=lambda step: losses.append((step.step, step.loss)),
        **options,
    )
    return losses, student


def norms_only(student):
    """Train the norms' weights and nothing else."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("norm" in name)

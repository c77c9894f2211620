"""Graphs that training with compiled layers makes."""

from __future__ import annotations

import torch
from helpers import tiny
from torch._dynamo.backends.debugging import aot_eager

from minitron.distill import DistillConfig, LiveTeacher, distill
from minitron.evaluation import heldout_metrics


class RandomRows:
    seq_length = 16

    def __len__(self):
        return 64

    def take(self, indices):
        return tiny.rows(64)[list(indices)]


def test_each_model_has_one_graph_per_kind_of_layer_and_micro_batch_size_and_evaluations_have_none(monkeypatch):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counting, **options))
    torch._dynamo.reset()
    student, teacher = (tiny.model("gemma3_text", num_hidden_layers=layers, seed=layers) for layers in (4, 6))
    # micro-batches of 2 rows and of 1
    config = DistillConfig(steps=2, batch_rows=3, micro_batch_rows=2, warmup_steps=0, compile=True, evaluate_every=1)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        distill(
            student,
            LiveTeacher(teacher),
            RandomRows(),
            config,
            evaluate=lambda _, model: heldout_metrics(model, tiny.rows(5, seq_length=9), batch_rows=3),
        )
    # student and teacher; layers that see a window and layers that see all
    assert len(graphs) == 2 * 2 * 2

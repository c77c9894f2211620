"""Graphs that training with compiled layers makes."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.graphs import counted_graphs

from minitron.distill import DistillConfig, LiveTeacher, Losses, blocks, distill
from minitron.evaluation import heldout_metrics

NEXT_TOKEN = Losses(logits="none", cross_entropy=1.0)


class RandomRows:
    seq_length = 16

    def __len__(self):
        return 64

    def take(self, indices):
        return tiny.rows(64)[list(indices)]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made."""
    made = counted_graphs(monkeypatch)
    monkeypatch.setattr(blocks, "_shapes", set())  # without those of tests before
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield made


def test_candidates_of_a_search_share_graphs_and_stay_below_the_limit(graphs, monkeypatch):
    config = DistillConfig(steps=1, batch_rows=2, micro_batch_rows=2, warmup_steps=0, compile=True)
    monkeypatch.setattr(blocks, "GRAPHS", 2)
    monkeypatch.setattr(blocks, "GRAPHS_OF_A_SHAPE", 1)

    def new_graphs(**shape):
        before = len(graphs)
        distill(tiny.model(**shape), None, RandomRows(), config, losses=NEXT_TOKEN)
        return len(graphs) - before

    assert new_graphs(num_hidden_layers=3) == 1
    assert new_graphs(num_hidden_layers=2) == 0
    assert new_graphs(num_hidden_layers=2, intermediate_size=64) == 1
    assert new_graphs(num_hidden_layers=3) == 0
    # a third width, of at most two graphs
    assert [new_graphs(num_hidden_layers=2, intermediate_size=size) for size in (48, 32, 48)] == [1, 1, 0]


def test_each_model_has_one_graph_per_kind_of_layer_and_micro_batch_size_and_evaluations_have_none(graphs):
    student, teacher = (tiny.model("gemma3_text", num_hidden_layers=layers, seed=layers) for layers in (4, 6))
    # micro-batches of 2 rows and of 1
    config = DistillConfig(steps=2, batch_rows=3, micro_batch_rows=2, warmup_steps=0, compile=True, evaluate_every=1)
    distill(
        student,
        LiveTeacher(teacher),
        RandomRows(),
        config,
        evaluate=lambda _, model: heldout_metrics(model, tiny.rows(5, seq_length=9), batch_rows=3),
    )
    # student and teacher; layers that see a window and layers that see all
    assert len(graphs) == 2 * 2 * 2

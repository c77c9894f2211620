"""Graphs that training with compiled layers makes."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.graphs import counted_graphs

from minitron.distill import DistillConfig, LiveTeacher, Losses, blocks, distill
from minitron.distill.activations import kept_per_token
from minitron.distill.blocks import running_blocks
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


@pytest.mark.parametrize(("family", "share"), [("llama", 0.75), ("gemma3_text", 0.6)])
def test_compiled_layers_keep_less_than_is_estimated_of_those_that_are_not(family, share, monkeypatch):
    compile_ = torch.compile  # what is kept is chosen as for a GPU; without C++
    monkeypatch.setattr(
        torch, "compile", lambda forward, **options: compile_(forward, backend="aot_eager_decomp_partition", **options)
    )
    torch._dynamo.reset()
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "head_dim": 64, "attention_bias": False, "mlp_bias": False}
    model = tiny.model(family, num_hidden_layers=3, sliding_window=None, **sizes).to(torch.bfloat16)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    tokens = tiny.rows(2, seq_length=256)
    with running_blocks(model, activation_checkpointing="none", compiled=True):
        hidden = model.get_decoder()(tokens, use_cache=False).last_hidden_state
        kept = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for layer in _compiled_nodes(hidden.grad_fn)
            for tensor in layer.saved_tensors
        }
    size = sum(nbytes for storage, nbytes in kept.items() if storage not in weights)
    estimate = 3 * tokens.numel() * kept_per_token(tiny.architecture(model), 2, "none")
    assert 0.4 * estimate < size < share * estimate


def _compiled_nodes(node):
    """The nodes of compiled layers among those that a node of autograd's graph leads to."""
    nodes, seen = [node], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "saved_tensors"):
                yield node

"""Scores against a plain reading of the papers' formulas."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional

from minitron import estimate_importance
from minitron.errors import InputError

AGGREGATE = {
    "mean": lambda x, dim: x.abs().mean(dim),
    "l2": lambda x, dim: x.square().sum(dim).sqrt(),
    "var": lambda x, dim: x.var(dim, correction=0),
}


def _capture(model, rows):
    """Inputs of o_proj and down_proj, outputs of every norm, and the residual stream, over all rows at once."""
    seen = {"heads": [], "neurons": [], "norms": [], "stream": []}
    handles = []
    for layer in model.model.layers:
        handles += [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, a: seen["heads"].append(a[0])),
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: seen["neurons"].append(a[0])),
            layer.input_layernorm.register_forward_hook(lambda _, a, out: seen["norms"].append(out)),
            layer.post_attention_layernorm.register_forward_hook(lambda _, a, out: seen["norms"].append(out)),
            layer.register_forward_pre_hook(lambda _, a: seen["stream"].append(a[0])),
        ]
    handles.append(model.model.norm.register_forward_hook(lambda _, a, out: seen["norms"].append(out)))
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, a: seen["stream"].append(a[0])))
    with torch.no_grad():
        model(rows)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("batch", AGGREGATE)
@pytest.mark.parametrize("sequence", AGGREGATE)
def test_every_pair_of_aggregations_matches_its_formula(batch, sequence):
    model, rows = tiny.model(), tiny.rows(6)
    scores = estimate_importance(model, rows, batch_aggregation=batch, sequence_aggregation=sequence, batch_rows=4)
    seen = _capture(model, rows)

    def aggregate(values):
        return AGGREGATE[batch](AGGREGATE[sequence](values.double(), 1), 0)

    heads = torch.stack([aggregate(x.unflatten(-1, (8, 24)).norm(dim=-1)) for x in seen["heads"]])
    neurons = torch.stack([aggregate(x) for x in seen["neurons"]])
    channels = torch.stack([aggregate(x) for x in seen["norms"]]).sum(0)
    for actual, expected in ((scores.heads, heads), (scores.neurons, neurons), (scores.channels, channels)):
        assert torch.allclose(actual.double(), expected, rtol=1e-4, atol=1e-6)


def test_layer_scores_without_losses_are_block_importance():
    model, rows = tiny.model(), tiny.rows(6)
    scores = estimate_importance(model, rows)
    stream = _capture(model, rows)["stream"]
    expected = [
        1 - functional.cosine_similarity(a.double(), b.double(), dim=-1).mean()
        for a, b in zip(stream[:-1], stream[1:], strict=True)
    ]
    assert torch.allclose(scores.layers.double(), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_block_losses_are_the_losses_without_those_layers(family):
    model, rows = tiny.model(family), tiny.rows(6)
    scores = estimate_importance(model, rows, block_sizes=(1, 2), batch_rows=4)
    layers = model.model.layers
    for size in (1, 2):
        for start in range(len(layers) - size + 1):
            model.model.layers = torch.nn.ModuleList([x for i, x in enumerate(layers) if not start <= i < start + size])
            with torch.no_grad():
                logits = model(rows, use_cache=False).logits
            expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
            assert abs(float(scores.block_loss[size][start]) - float(expected)) < 1e-4
    model.model.layers = layers


def test_calibration_leaves_no_hook_and_no_mode_behind():
    model = tiny.model().train()
    estimate_importance(model, tiny.rows(2), block_sizes=(1,))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_unknown_aggregation_is_named():
    with pytest.raises(InputError, match="sequence_aggregation: 'max'"):
        estimate_importance(tiny.model(), tiny.rows(), sequence_aggregation="max")

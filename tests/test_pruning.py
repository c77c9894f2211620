"""Slicing equals masking, for every family and axis; what is pruned saves, loads and generates as a plain model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from masked import masked
from transformers import AutoModelForCausalLM

from minitron import ImportanceScores, estimate_importance, prune
from minitron.errors import InputError
from minitron.selection import select

AXES = {
    "depth": {"num_layers": 3},
    "hidden": {"hidden_size": 40},
    "mlp": {"intermediate_size": 33},
    "heads": {"num_heads": 4},
    "kv groups": {"num_heads": 4, "num_kv_heads": 1},
    "all": {"num_layers": 3, "hidden_size": 40, "intermediate_size": 33, "num_heads": 4},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("axis", AXES)
def test_sliced_logits_equal_masked_logits(family, tied, axis):
    model = tiny.model(family, tied)
    base = tiny.architecture(model)
    scores = estimate_importance(model, tiny.rows(), block_sizes=(2,))
    target = replace(base, **AXES[axis])
    with torch.no_grad():
        expected = masked(model, select(scores, base, target), base.head_dim)(tiny.rows(seed=9)).logits
        actual = prune(model.double(), target, scores)(tiny.rows(seed=9)).logits
    assert expected.std() > 0.05  # the reference says something
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pruned_model_is_a_plain_checkpoint(family, tied, tmp_path):
    model = tiny.model(family, tied)
    target = replace(tiny.architecture(model), **AXES["all"])
    student = prune(model, target, estimate_importance(model, tiny.rows()))
    assert student.num_parameters() == target.num_parameters
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = tiny.rows(2, 6, seed=4)
    with torch.no_grad():
        assert torch.equal(loaded(prompt).logits, student(prompt).logits)
        # with the KV cache, generation gives what repeated full passes give
        generated = student.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        full = prompt
        for _ in range(5):
            full = torch.cat([full, student(full).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, full)


def test_nothing_removed_is_the_same_model():
    model = tiny.model()
    same = prune(model, tiny.architecture(model), estimate_importance(model, tiny.rows()))
    with torch.no_grad():
        assert torch.equal(same(tiny.rows()).logits, model(tiny.rows()).logits)


def test_pruning_leaves_the_original_alone():
    model = tiny.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = prune(model, tiny.architecture(model), estimate_importance(model, tiny.rows()))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sliding_window_settings_follow_the_layers_that_stay():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = tiny.model("qwen2", layer_types=kinds, sliding_window=4, use_sliding_window=True)
    base = tiny.architecture(model)
    scores = estimate_importance(model, tiny.rows(), block_sizes=(2,))
    target = replace(base, num_layers=3)
    kept = select(scores, base, target).layers
    student = prune(model, target, scores)
    assert student.config.layer_types == [kinds[i] for i in kept]


def test_the_best_scored_units_stay_in_order():
    model = tiny.model()
    base = tiny.architecture(model)
    scores = estimate_importance(model, tiny.rows())
    kept = select(scores, base, replace(base, hidden_size=16, intermediate_size=10, num_heads=4))
    assert set(kept.hidden.tolist()) == set(scores.channels.topk(16).indices.tolist())
    assert kept.hidden.tolist() == sorted(kept.hidden.tolist())
    for layer, heads in enumerate(kept.heads):
        groups = scores.heads[layer].view(2, 4)
        assert [int(h) // 4 for h in heads] == [0, 0, 1, 1]  # two of each KV group
        assert set(heads.tolist()) == {g * 4 + int(i) for g in range(2) for i in groups[g].topk(2).indices}


def test_the_least_important_block_of_layers_goes():
    model = tiny.model()
    base = tiny.architecture(model)
    scores = estimate_importance(model, tiny.rows(), block_sizes=(2,))
    start = int(scores.block_loss[2].argmin())
    assert select(scores, base, replace(base, num_layers=3)).layers == [
        i for i in range(5) if not start <= i < start + 2
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 128}, "hidden_size: 128"),
        ({"num_layers": 9}, "num_layers: 9"),
        ({"vocab_size": 10}, "vocab_size: 10"),
        ({"num_heads": 8, "num_kv_heads": 1}, "num_heads: 8"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(change, named):
    model = tiny.model()
    scores = estimate_importance(model, tiny.rows())
    with pytest.raises(InputError, match=named):
        prune(model, replace(tiny.architecture(model), **change), scores)


def test_scores_survive_saving(tmp_path):
    scores = estimate_importance(tiny.model(), tiny.rows(), block_sizes=(1, 2))
    scores.save(tmp_path / "scores.safetensors")
    loaded = ImportanceScores.load(tmp_path / "scores.safetensors")
    assert loaded.provenance == scores.provenance
    for name in ("heads", "neurons", "channels", "similarity", "layers"):
        assert torch.equal(getattr(loaded, name), getattr(scores, name))
    assert torch.equal(loaded.blocks(2), scores.blocks(2))

"""Slicing equals masking for every family and axis; pruned models save, load and generate like any other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.masked import masked
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config

from minitron import ImportanceScores, prune
from minitron.errors import InputError
from minitron.pruning.selection import kept_layers, select

AXES = {
    "depth": {"num_layers": 3},
    "hidden": {"hidden_size": 40},
    "mlp": {"intermediate_size": 33},
    "heads": {"num_heads": 4},
    "kv groups": {"num_heads": 4, "num_kv_heads": 1},
    "all": {"num_layers": 3, "hidden_size": 40, "intermediate_size": 33, "num_heads": 4},
}
CASES = [(family, axis, change) for family in tiny.FAMILIES for axis, change in AXES.items()]
CASES += [(family, "experts", {"num_experts": 3}) for family in tiny.MIXTURES]
CASES += [(family, "all and experts", {**AXES["all"], "num_experts": 3}) for family in tiny.MIXTURES]
# Gemma's norms compute in float32 in every dtype, and a smaller hidden size moves a factor through them
TOLERANCE = {"gemma2": 1e-6, "gemma3_text": 1e-6}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "axis", "change"), CASES, ids=[f"{family}-{axis}" for family, axis, _ in CASES])
def test_sliced_logits_equal_masked_logits(family, axis, change, tied):
    model = tiny.model(family, tied).double()
    base = tiny.architecture(model)
    scores, target = tiny.scores(base), replace(base, **change)
    with torch.no_grad():
        rows = tiny.rows(seed=9)
        expected = masked(model, select(scores, base, target), base.head_dim)(rows, use_cache=False).logits
        actual = prune(model, target, scores)(rows).logits
        before = model(rows).logits
    assert expected.std() > 0.05  # the reference is not constant
    assert (before - expected).abs().max() > 0.01  # and depends on the axis
    tolerance = TOLERANCE.get(family, 1e-9)
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def greedy(model, prompt, count):
    """Generate tokens greedily with full forward passes, without a KV cache."""
    for _ in range(count):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pruned_model_is_a_plain_transformers_checkpoint(family, tied, tmp_path):
    model = tiny.model(family, tied)
    base = tiny.architecture(model)
    target = replace(base, **AXES["all"], num_experts=3 if base.num_experts else 0)
    student = prune(model, target, tiny.scores(base))
    assert student.num_parameters() == target.num_parameters
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    prompt = tiny.rows(2, 6, seed=4)
    with torch.no_grad():
        assert torch.equal(loaded(prompt).logits, student(prompt).logits)
        generated = student.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(generated, greedy(student, prompt, 5))
    assert tiny.architecture(loaded) == target


WINDOWS = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {"sliding_window": 5},
    "mixtral": {"sliding_window": 5},
    "qwen3_moe": {"sliding_window": 5, "use_sliding_window": True},
}


@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_are_those_of_the_kept_layers(family):
    model = tiny.model(family, **WINDOWS[family]).double()
    base = tiny.architecture(model)
    scores, target = tiny.scores(base), replace(base, num_layers=3)
    layers, rows = [0, 3, 4], tiny.rows(2, 16, seed=9)
    student = prune(model, target, scores, layers=layers)
    with torch.no_grad():
        expected = masked(model, select(scores, base, target, layers=layers), base.head_dim)(
            rows, use_cache=False
        ).logits
        assert torch.allclose(student(rows).logits, expected, rtol=1e-9, atol=1e-9)
        generated = student.generate(rows, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(generated, greedy(student, rows, 5))
        student.config.sliding_window = 100
        for layer in student.model.layers:
            layer.self_attn.sliding_window = 100
        assert not torch.allclose(student(rows).logits, expected, rtol=1e-3)  # the sliding windows matter
    kinds = getattr(model.config, "layer_types", None)
    assert kinds is None or student.config.layer_types == [kinds[i] for i in layers]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_implicit_head_dim_becomes_explicit(family, tmp_path):
    model = tiny.model(family, head_dim=None)
    base = tiny.architecture(model)
    assert base.head_dim == 64 // 8
    student = prune(model, replace(base, hidden_size=40), tiny.scores(base))
    student.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).head_dim == 8
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tiny.rows()).logits, student(tiny.rows()).logits)


def longrope(hidden_size):
    return Phi3Config(hidden_size=hidden_size, num_attention_heads=8, rope_parameters=dict(tiny.LONGROPE))


def test_a_longrope_model_keeps_its_ratio_of_hidden_size_to_heads():
    with pytest.raises(Exception, match="short_factor"):
        longrope(40)  # transformers refuses such a config
    model = tiny.model("phi3", rope_parameters=longrope(64).rope_parameters, head_dim=None)
    base = tiny.architecture(model)
    with pytest.raises(InputError, match=r"hidden_size: 40 with 8 heads.*longrope"):
        prune(model, replace(base, hidden_size=40), tiny.scores(base))
    student = prune(model, replace(base, hidden_size=32, num_heads=4), tiny.scores(base))
    assert tiny.architecture(student) == replace(base, hidden_size=32, num_heads=4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral"])
def test_pruning_to_the_same_architecture_gives_the_same_model(family):
    model = tiny.model(family)
    base = tiny.architecture(model)
    with torch.no_grad():
        assert torch.equal(prune(model, base, tiny.scores(base))(tiny.rows()).logits, model(tiny.rows()).logits)


def test_a_bfloat16_model_stays_bfloat16():
    model = tiny.model("gemma2").bfloat16()
    base = tiny.architecture(model)
    target, scores = replace(base, hidden_size=40), tiny.scores(base)
    student = prune(model, target, scores)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        wide = prune(model.float(), target, scores)(tiny.rows()).logits
        assert (student.float()(tiny.rows()).logits - wide).abs().mean() < 0.01 * wide.std()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_pruning_does_not_change_the_original(family):
    model = tiny.model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = prune(model, tiny.architecture(model), tiny.scores(tiny.architecture(model)))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_removed_heads_can_be_merged_into_the_kept_ones():
    model = tiny.model("phi3")
    base = tiny.architecture(model)
    target, scores = replace(base, num_heads=4), tiny.scores(base)
    kept = select(scores, base, target).heads[0].tolist()
    old = model.state_dict()["model.layers.0.self_attn.qkv_proj.weight"][: 8 * 24].view(8, 24, -1)
    new = prune(model, target, scores, merge_heads=-1).state_dict()["model.layers.0.self_attn.qkv_proj.weight"]
    gone = [head for head in range(8) if head not in kept]
    for place, head in enumerate(new[: 4 * 24].view(4, 24, -1)):
        # with the sign of layer collapse every kept head becomes a removed head of its group
        assert any(torch.allclose(head, old[i], atol=1e-6) for i in gone if i // 4 == kept[place] // 4)


def test_the_units_with_the_highest_scores_are_kept_in_order():
    base = tiny.architecture(tiny.model())
    scores = tiny.scores(base)
    kept = select(scores, base, replace(base, hidden_size=16, intermediate_size=10, num_heads=4))
    assert set(kept.hidden.tolist()) == set(scores.channels.topk(16).indices.tolist())
    assert kept.hidden.tolist() == sorted(kept.hidden.tolist())
    for layer, heads in enumerate(kept.heads):
        groups = scores.heads[layer].view(2, 4)
        assert [int(h) // 4 for h in heads] == [0, 0, 1, 1]  # two heads of each KV group
        assert set(heads.tolist()) == {g * 4 + int(i) for g in range(2) for i in groups[g].topk(2).indices}


def test_every_expert_keeps_its_own_best_neurons():
    base = tiny.architecture(tiny.model("mixtral"))
    scores = tiny.scores(base)
    kept = select(scores, base, replace(base, num_experts=3, intermediate_size=10))
    for layer, (experts, neurons) in enumerate(zip(kept.experts, kept.neurons, strict=True)):
        assert experts.tolist() == sorted(scores.experts[layer].topk(3).indices.tolist())
        for expert, own in zip(experts, neurons, strict=True):
            assert own.tolist() == sorted(scores.neurons[layer, expert].topk(10).indices.tolist())


LOSSES = {1: torch.tensor([9.0, 1, 5, 2, 8]), 2: torch.tensor([9.0, 3, 4, 7])}
SCORED = {"loss": LOSSES, "logit_error": {1: torch.tensor([1.0, 9, 2, 9, 9]), 2: torch.tensor([5.0, 5, 1, 5])}}
ORDERS = {"loss": {1: [1, 2, 3, 4], 2: [3, 4, 0, 1]}, "logit_error": {2: [0, 4]}}


@pytest.mark.parametrize(
    ("target", "options", "kept"),
    [
        (5, {"how": "iterative"}, [0, 1, 2, 3, 4]),
        (3, {}, [0, 3, 4]),
        (3, {"metric": "logit_error"}, [0, 1, 4]),
        (3, {"how": "scattered"}, [0, 2, 4]),
        (3, {"how": "scattered", "metric": "logit_error"}, [1, 3, 4]),
        (3, {"how": "iterative"}, [0, 3, 4]),
        (2, {"how": "iterative"}, [0, 4]),
        (3, {"how": "iterative", "metric": "logit_error"}, [1, 2, 3]),
    ],
)
def test_layers_are_removed_by_the_given_method_and_metric(target, options, kept):
    scores = scored()
    assert kept_layers(scores, 5, target, **options) == kept


@pytest.mark.parametrize(
    ("target", "options", "named"),
    [
        (3, {"how": "random"}, "how: 'random'"),
        (3, {"metric": "task:piqa"}, "blocks of 2 layers by task:piqa"),
        (
            4,
            {"how": "iterative", "metric": "logit_error"},
            "removing 1 iteratively by 'logit_error'.*logit_error: 2 by 2",
        ),
        (3, {"how": "iterative", "metric": "task:piqa"}, "removing 2 iteratively by 'task:piqa'"),
    ],
)
def test_layer_metrics_that_were_not_measured_are_refused(target, options, named):
    with pytest.raises(InputError, match=named):
        kept_layers(scored(), 5, target, **options)


def scored() -> ImportanceScores:
    base = tiny.architecture(tiny.model())
    return replace(tiny.scores(base), removal=SCORED, orders=ORDERS)


def test_the_least_important_block_of_layers_is_removed():
    base = tiny.architecture(tiny.model())
    assert select(scored(), base, replace(base, num_layers=3)).layers == [0, 3, 4]


@pytest.mark.parametrize("layers", [[0, 3, 2], [0, 1, 1], [0, 1, 5], [-1, 0, 1], [0, 1]])
def test_invalid_layers_to_keep_are_refused(layers):
    base = tiny.architecture(tiny.model())
    with pytest.raises(InputError, match="layers: "):
        select(scored(), base, replace(base, num_layers=3), layers=layers)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"hidden_size": 128}, "hidden_size: 128"),
        ("llama", {"num_layers": 9}, "num_layers: 9"),
        ("llama", {"vocab_size": 10}, "vocab_size: 10"),
        ("llama", {"num_heads": 8, "num_kv_heads": 1}, "num_heads: 8"),
        ("mixtral", {"num_experts": 5}, "num_experts: 5 is larger"),
        ("mixtral", {"experts_per_token": 1}, "experts_per_token: 1 differs"),
    ],
)
def test_an_architecture_that_cannot_be_pruned_from_the_model_is_refused(family, change, named):
    model = tiny.model(family)
    base = tiny.architecture(model)
    with pytest.raises(InputError, match=named):
        prune(model, replace(base, **change), tiny.scores(base))


def test_scores_without_experts_are_refused_for_a_mixture():
    model = tiny.model("mixtral")
    base = tiny.architecture(model)
    with pytest.raises(InputError, match=r"scores.experts: missing"):
        prune(model, base, replace(tiny.scores(base), experts=None))

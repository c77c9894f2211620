"""Importance scores equal a direct implementation of the papers' formulas."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron import ImportanceScores, estimate_importance, logits
from minitron.architecture import Architecture
from minitron.errors import InputError, StorageError
from minitron.evaluation import Task, evaluate
from minitron.importance import LayerScoring, removal, similarity
from minitron.importance.view import without_layers

AGGREGATE = {
    "mean": lambda x, dim: x.abs().mean(dim),
    "l2": lambda x, dim: x.square().sum(dim).sqrt(),
    "var": lambda x, dim: x.var(dim, correction=0),
}
FEEDS_MLP = {"gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm"}


def _seen(model, rows, places):
    """{name: [layers] of a module's input (or, for norms, output)} over all rows at once, float64; "final" is the last norm's
    input and output, "stream" every layer's input and what leaves the last."""
    seen = {name: [] for name in (*places, "stream", "final")}
    handles = []
    for layer in model.model.layers:
        for name in places:
            handles.append(
                layer.get_submodule(name).register_forward_hook(
                    lambda _, given, out, name=name: seen[name].append((out if "norm" in name else given[0]).double())
                )
            )
        handles.append(layer.register_forward_pre_hook(lambda _, given: seen["stream"].append(given[0].double())))
    handles.append(
        model.model.norm.register_forward_pre_hook(lambda _, given: seen["stream"].append(given[0].double()))
    )
    handles.append(model.model.norm.register_forward_hook(lambda _, given, out: seen["final"].append(out.double())))
    with torch.no_grad():
        model(rows)
    for handle in handles:
        handle.remove()
    return seen


def _cut(model, removed):
    """A model without the `removed` layers, which transformers builds from a config."""
    kept = [layer for layer in range(model.config.num_hidden_layers) if layer not in removed]
    config = copy.deepcopy(model.config)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    config.num_hidden_layers = len(kept)
    state = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    for new, old in enumerate(kept):
        prefix = f"model.layers.{old}."
        state |= {
            f"model.layers.{new}.{name.removeprefix(prefix)}": value
            for name, value in model.state_dict().items()
            if name.startswith(prefix)
        }
    made = AutoModelForCausalLM.from_config(config).float().eval()
    made.load_state_dict(state)
    return made


def _logits(model, rows):
    with torch.no_grad():
        return model(rows, use_cache=False).logits.double()


def _loss(model, rows):
    return float(functional.cross_entropy(_logits(model, rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))


def _logit_error(model, rows, removed):
    whole = _logits(model, rows)
    return float((whole - _logits(_cut(model, removed), rows)).square().sum() / whole.square().sum())


def _close(actual, expected):
    return torch.allclose(actual.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", AGGREGATE)
@pytest.mark.parametrize("sequence", AGGREGATE)
def test_every_pair_of_aggregations_matches_its_formula(batch, sequence):
    _check_units("llama", batch, sequence)


@pytest.mark.parametrize("family", tiny.DENSE)
def test_units_match_their_formulas_in_every_dense_family(family):
    _check_units(family, "l2", "mean")


def _check_units(family, batch, sequence):
    model, rows = tiny.model(family), tiny.rows(6)
    scores = estimate_importance(model, rows, batch_aggregation=batch, sequence_aggregation=sequence, batch_rows=4)
    norms = ["input_layernorm", FEEDS_MLP.get(family, "post_attention_layernorm")]
    seen = _seen(model, rows, ["self_attn.o_proj", "mlp.down_proj", *norms])

    def aggregate(values):
        return AGGREGATE[batch](AGGREGATE[sequence](values, 1), 0)

    shape = (model.config.num_attention_heads, -1)
    heads = torch.stack([aggregate(x.unflatten(-1, shape).norm(dim=-1)) for x in seen["self_attn.o_proj"]])
    neurons = torch.stack([aggregate(x) for x in seen["mlp.down_proj"]])
    channels = torch.stack([aggregate(x) for name in [*norms, "final"] for x in seen[name]]).sum(0)
    assert _close(scores.heads, heads)
    assert _close(scores.neurons, neurons)
    assert _close(scores.channels, channels)
    assert scores.experts is None


@pytest.mark.parametrize("family", tiny.DENSE)
def test_neurons_can_be_scored_before_the_activation(family):
    model, rows = tiny.model(family), tiny.rows(6)
    scores = estimate_importance(model, rows, neurons="pre")
    norm = FEEDS_MLP.get(family, "post_attention_layernorm")
    for layer, entering, actual in zip(
        model.model.layers, _seen(model, rows, [norm])[norm], scores.neurons, strict=True
    ):
        first = {"nemotron": "up_proj", "phi3": "gate_up_proj"}.get(family, "gate_proj")
        with torch.no_grad():
            product = layer.mlp.get_submodule(first)(entering.float()).double()[..., : model.config.intermediate_size]
        assert _close(actual, product.abs().mean(1).square().sum(0).sqrt())


@pytest.mark.parametrize("neurons", ["post", "pre"])
@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_experts_are_scored_on_the_tokens_that_are_routed_to_them(family, neurons):
    model, rows = tiny.model(family), tiny.rows(6)
    scores = estimate_importance(model, rows, neurons=neurons, batch_rows=4)
    given = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, values: given.append(values))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(rows)
    for handle in handles:
        handle.remove()
    for layer, (hidden, index, weights) in enumerate(given):
        experts = model.model.layers[layer].mlp.experts
        tables = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()
        count, _, width = tables[1].shape
        units, outputs = torch.zeros(len(hidden), count, width).double(), torch.zeros(len(hidden), count).double()
        for token in range(len(hidden)):
            for expert, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
                gate, up = (tables[0][expert] @ hidden[token].double()).chunk(2)
                active = functional.silu(gate) * up
                units[token, expert] = gate if neurons == "pre" else active
                outputs[token, expert] = (weight * (tables[1][expert] @ active)).norm()
        assert _close(scores.neurons[layer], units.unflatten(0, rows.shape).abs().mean(1).square().sum(0).sqrt())
        assert _close(scores.experts[layer], outputs.unflatten(0, rows.shape).mean(1).square().sum(0).sqrt())
    assert float(scores.experts.std()) > 0


@pytest.mark.parametrize("chunk", [128, 7])
def test_layer_scores_without_losses_are_block_importance(chunk, monkeypatch):
    monkeypatch.setattr(similarity, "CHUNK", chunk)
    model, rows = tiny.model(), tiny.rows(6)
    scores = estimate_importance(model, rows, batch_rows=4)
    stream = _seen(model, rows, [])["stream"]
    expected = torch.tensor(
        [[functional.cosine_similarity(a, b, dim=-1).mean() for b in stream] for a in stream], dtype=torch.float64
    )
    assert torch.allclose(scores.similarity.double(), expected, atol=1e-6)
    for size in (1, 2):
        assert torch.equal(scores.blocks(size), 1 - torch.diagonal(scores.similarity, offset=size))
    assert torch.equal(scores.layers, scores.blocks(1, "cosine"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layer_losses_and_logit_errors_are_those_of_a_model_without_the_layers(family, monkeypatch):
    for module in (logits, removal):
        monkeypatch.setattr(module, "CHUNK_TOKENS", 20)
    model, rows = tiny.model(family), tiny.rows(6)
    scorings = [LayerScoring(sizes=(1, 2)), LayerScoring("logit_error", sizes=(2,), rows=5)]
    scores = estimate_importance(model, rows, layers=scorings, batch_rows=4)
    for size in (1, 2):
        expected = [_loss(_cut(model, range(start, start + size)), rows) for start in range(6 - size)]
        assert torch.allclose(scores.blocks(size), torch.tensor(expected), atol=1e-4)
    expected = [_logit_error(model, rows[:5], (start, start + 1)) for start in range(4)]
    assert torch.allclose(scores.blocks(2, "logit_error"), torch.tensor(expected), rtol=1e-3)
    assert torch.equal(scores.layers, scores.removal["loss"][1])


@pytest.mark.parametrize("metric", ["loss", "logit_error", "cosine"])
@pytest.mark.parametrize(("size", "keep", "taken"), [(1, 2, 3), (2, 1, 4)])
def test_iterative_removal_measures_the_remaining_layers_again(metric, size, keep, taken):
    model, rows = tiny.model("qwen2", seed=5), tiny.rows(6)
    scores = estimate_importance(model, rows, layers=LayerScoring(metric, iterative=size, keep=keep))

    def measure(kept, start):
        gone = [i for i in range(5) if i not in kept or i in kept[start : start + size]]
        if metric == "loss":
            return _loss(_cut(model, gone), rows)
        if metric == "logit_error":
            return _logit_error(model, rows, gone)
        before = [i for i in range(5) if i not in kept]
        stream = _seen(_cut(model, before), rows, [])["stream"]
        return 1 - float(functional.cosine_similarity(stream[start], stream[start + size], dim=-1).mean())

    kept, order = list(range(5)), []
    while len(kept) - size >= keep:
        start = min(range(len(kept) - size + 1), key=lambda start: measure(kept, start))
        order += kept[start : start + size]
        kept = kept[:start] + kept[start + size :]
    assert scores.orders == {metric: {size: order}}
    assert len(order) == taken


def test_a_task_scores_layers_by_the_lost_accuracy(bench):
    model = AutoModelForCausalLM.from_pretrained(bench / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(bench / "teacher")
    task = Task("arc_easy", data=str(bench / "arc.jsonl"), limit=6)
    scoring = LayerScoring("task", sizes=(1, 3), iterative=2, keep=3, task=task)
    calls = []
    scores = estimate_importance(
        model, tiny.rows(2), layers=scoring, tokenizer=tokenizer, progress=lambda *now: calls.append(now)
    )

    def accuracy(removed):
        return evaluate(_cut(model, removed), tokenizer, [task])["arc_easy"].value

    whole = accuracy(())
    for size in (1, 3):
        lost = [whole - accuracy(range(start, start + size)) for start in range(6 - size)]
        assert torch.allclose(scores.blocks(size, "task:arc_easy"), torch.tensor(lost))
    pairs = [whole - accuracy((start, start + 1)) for start in range(4)]
    start = pairs.index(min(pairs))
    assert scores.orders == {"task:arc_easy": {2: [start, start + 1]}}
    assert calls[-1][0] == calls[-1][1]


def test_a_task_with_a_metric_that_should_be_low_scores_layers_by_its_increase(bench, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bench / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(bench / "teacher")
    lines = [json.dumps({"text": " ".join(text.split()[:9])}) for text in tiny.texts(4, seed=7)]
    (tmp_path / "lambada.jsonl").write_text("\n".join(lines))
    task = Task("lambada_openai", data=str(tmp_path / "lambada.jsonl"))
    scoring = LayerScoring("task", sizes=(1,), iterative=2, keep=3, task=task)
    scores = estimate_importance(model, tiny.rows(2), layers=scoring, tokenizer=tokenizer)

    def perplexity(removed):
        score = evaluate(_cut(model, removed), tokenizer, [task])["lambada_openai"]
        assert score.metric == "perplexity"
        return score.value

    whole = perplexity(())
    rises = [perplexity((layer,)) - whole for layer in range(5)]
    assert torch.allclose(scores.blocks(1, "task:lambada_openai"), torch.tensor(rises), rtol=1e-4)
    pairs = [perplexity((start, start + 1)) for start in range(4)]
    start = pairs.index(min(pairs))
    assert scores.orders == {"task:lambada_openai": {2: [start, start + 1]}}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_with_bypassed_layers_equals_the_smaller_model_and_is_restored(family):
    model = tiny.model(family)
    config, prompt = model.config.to_dict(), tiny.rows(2, 6, seed=4)
    expected = _cut(model, (1,))
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = _logits(model, prompt)
    with without_layers(model, (1,)):
        assert torch.equal(_logits(model, prompt), _logits(expected, prompt))
        assert torch.equal(model.generate(prompt, **arguments), expected.generate(prompt, **arguments))
    assert torch.equal(_logits(model, prompt), before)
    assert torch.equal(model.generate(prompt, **arguments), tiny.model(family).generate(prompt, **arguments))
    assert model.config.to_dict() == config


def test_calibration_removes_its_hooks_and_restores_the_training_mode():
    model = tiny.model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    scores = estimate_importance(model, tiny.rows(2), layers=LayerScoring(sizes=(1,)))
    still = estimate_importance(tiny.model(), tiny.rows(2), layers=LayerScoring(sizes=(1,)))
    assert torch.equal(scores.heads, still.heads)
    assert torch.equal(scores.layers, still.layers)
    assert model.training
    assert not model.model.layers[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_progress_ends_at_its_announced_total():
    calls = []
    scorings = [
        LayerScoring(sizes=(1, 2), rows=2, iterative=1, keep=3),
        LayerScoring("cosine", sizes=(1,), iterative=2),
    ]
    estimate_importance(tiny.model(), tiny.rows(3), layers=scorings, progress=lambda *now: calls.append(now))
    assert calls[-1][0] == calls[-1][1] == 3 + (5 + 4) * 2 + (5 + 4) * 2 + (4 + 2) * 3
    assert len({total for _, total in calls}) == 1


def test_scores_survive_saving_and_loading(tmp_path):
    scorings = [LayerScoring(sizes=(1, 2), iterative=2), LayerScoring("logit_error", sizes=(3,))]
    scores = estimate_importance(tiny.model(), tiny.rows(), layers=scorings)
    scores.save(tmp_path / "scores.safetensors")
    loaded = ImportanceScores.load(tmp_path / "scores.safetensors")
    assert (loaded.provenance, loaded.orders) == (scores.provenance, scores.orders)
    for name in ("heads", "neurons", "channels", "similarity", "layers"):
        assert torch.equal(getattr(loaded, name), getattr(scores, name))
    for metric, size in (("loss", 1), ("loss", 2), ("logit_error", 3)):
        assert torch.equal(loaded.blocks(size, metric), scores.blocks(size, metric))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "scores.safetensors").read_bytes()[:-7])
    with pytest.raises(StorageError, match=r"damaged\.safetensors"):
        ImportanceScores.load(damaged)


def test_scores_that_are_not_numbers_are_refused_and_not_ranked_first(tmp_path):
    overflowing = tiny.model()
    overflowing.model.layers[2].mlp.down_proj.weight.data.fill_(3e38)
    with pytest.raises(InputError, match="values of heads are not numbers"):
        estimate_importance(overflowing, tiny.rows())
    file = tmp_path / "scores.safetensors"
    tiny.scores(Architecture.from_config(overflowing.config)).save(file)
    tensors = load_file(file)
    tensors["channels"][3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(StorageError, match=r"scores\.safetensors: .* 1 of 64 values of channels are not numbers"):
        ImportanceScores.load(file)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sequence_aggregation": "max"}, "sequence_aggregation: 'max'"),
        ({"neurons": "before"}, "neurons: 'before'"),
        ({"layers": LayerScoring(sizes=(5,))}, "sizes: a block of 5 layers"),
        ({"layers": LayerScoring(iterative=3, keep=3)}, "iterative: removing 3 of 5 layers"),
        ({"layers": LayerScoring("task", sizes=(1,), task=Task("arc_easy"))}, "tokenizer: missing"),
    ],
)
def test_invalid_calibration_settings_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        estimate_importance(tiny.model(), tiny.rows(), **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"metric": "ppl"}, "metric: 'ppl'"),
        ({"metric": "task"}, "task: None"),
        ({"task": Task("arc_easy")}, "task: Task"),
        ({"keep": 0}, "keep: 0"),
    ],
)
def test_invalid_layer_scoring_is_refused(options, named):
    with pytest.raises(InputError, match=named):
        LayerScoring(**options)


def test_blocks_that_were_not_measured_are_refused():
    scores = estimate_importance(tiny.model(), tiny.rows(2), layers=LayerScoring(sizes=(2,)))
    with pytest.raises(
        InputError, match="blocks of 1 layers by loss: these scores have loss for 2; cosine of 5 layers"
    ):
        scores.blocks(1, "loss")
    with pytest.raises(InputError, match="blocks of 6 layers by cosine"):
        scores.blocks(6)

"""Pruning from folder to folder equals pruning in memory for every layout on disk; merged heads; iterative pruning."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron import prune, storage
from minitron.errors import InputError, StorageError
from minitron.importance import LayerScoring, estimate_importance
from minitron.models import load_model, load_tokenizer, save_model
from minitron.pruning.iterative import prune_in_steps, shapes_between
from minitron.pruning.source import PruningSource
from minitron.pruning.streaming import prune_checkpoint

SMALLER = {"num_layers": 3, "hidden_size": 40, "intermediate_size": 33, "num_heads": 4}


def on_disk(folder, family="llama", tied=True, shard="1GB", **changes):
    """Save a checkpoint with a tokenizer; returns its model, the architecture to prune to, and importance scores."""
    model = tiny.model(family, tied, **changes)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny.tokenizer().save_pretrained(folder)
    base = tiny.architecture(model)
    fewer = {"num_experts": base.num_experts - 1} if base.num_experts else {}
    return model, replace(base, **SMALLER, **fewer), tiny.scores(base)


def same_logits(folder, model):
    # the eager implementation of experts supports any width
    loaded = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    with torch.no_grad():
        return torch.equal(loaded(tiny.rows()).logits, model(tiny.rows()).logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streaming_equals_pruning_in_memory(family, tied, tmp_path):
    model, target, scores = on_disk(tmp_path / "model", family, tied)
    steps = []
    prune_checkpoint(tmp_path / "model", tmp_path / "out", target, scores, progress=lambda *step: steps.append(step))
    expected = prune(model, target, scores)
    assert same_logits(tmp_path / "out", expected)
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # the same files, names and settings as from save_pretrained
    expected.save_pretrained(tmp_path / "saved")
    assert sorted(load_file(tmp_path / "out/model.safetensors")) == sorted(
        load_file(tmp_path / "saved/model.safetensors")
    )
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "saved")]
    assert configs[0] == configs[1]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    note = storage.manifest(str(tmp_path / "out"))["note"]
    assert note["architecture"] == target.to_dict()
    storage.verify(str(tmp_path / "out"))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sharded_checkpoints_are_read_and_written(family, tmp_path):
    model, target, scores = on_disk(tmp_path / "model", family, tied=False, shard="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    prune_checkpoint(tmp_path / "model", tmp_path / "out", target, scores, shard_bytes=40_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, 1 + len(shards))
    ]
    total = 0
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 40_000
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert same_logits(tmp_path / "out", prune(model, target, scores))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_in_one_tensor_are_pruned(family, tmp_path):
    model, target, scores = on_disk(tmp_path / "model", family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "model", tmp_path / "out", target, scores)
    assert same_logits(tmp_path / "out", prune(model, target, scores))


def test_a_single_file_has_precedence_over_shards_as_in_transformers(tmp_path):
    model, target, scores = on_disk(tmp_path / "model")
    on_disk(tmp_path / "other", seed=1, shard="100KB")
    for file in (tmp_path / "other").glob("model*"):
        file.rename(tmp_path / "model" / file.name)
    assert (tmp_path / "model/model.safetensors.index.json").exists()
    assert same_logits(tmp_path / "model", model)
    prune_checkpoint(tmp_path / "model", tmp_path / "out", target, scores)
    assert same_logits(tmp_path / "out", prune(model, target, scores))


def test_the_dtype_of_the_weights_is_kept(tmp_path):
    _, target, scores = on_disk(tmp_path / "float", "llama")
    model = load_model(tmp_path / "float", torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    prune_checkpoint(tmp_path / "model", tmp_path / "out", target, scores)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    expected, actual = (
        prune(model, target, scores).state_dict(),
        load_model(tmp_path / "out", torch.bfloat16).state_dict(),
    )
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def test_the_kept_layers_can_be_given_and_keep_their_settings(tmp_path):
    model, target, scores = on_disk(tmp_path / "model", "gemma2")
    prune_checkpoint(tmp_path / "model", tmp_path / "out", target, scores, layers=[0, 2, 4])
    assert same_logits(tmp_path / "out", prune(model, target, scores, layers=[0, 2, 4]))
    kinds = [json.loads((tmp_path / name / "config.json").read_text())["layer_types"] for name in ("model", "out")]
    assert kinds[1] == kinds[0][::2]
    assert kinds[1] != kinds[0][:3]
    assert storage.manifest(str(tmp_path / "out"))["note"]["layers"] == [0, 2, 4]


def test_an_interrupted_pruning_leaves_no_folder(tmp_path):
    _, target, scores = on_disk(tmp_path / "model")

    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(tmp_path / "model", tmp_path / "out", target, scores, shard_bytes=20_000, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_folder_is_not_changed(tmp_path):
    _, target, scores = on_disk(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("here")
    with pytest.raises(InputError, match="out exists"):
        prune_checkpoint(tmp_path / "model", tmp_path / "out", target, scores)
    assert (tmp_path / "out/precious").read_text() == "here"


def test_a_model_is_not_lost_to_another_that_was_written_to_the_same_folder_meanwhile(tmp_path):
    _, target, scores = on_disk(tmp_path / "model")
    model, out = tmp_path / "model", tmp_path / "out"
    smaller = replace(target, num_layers=target.num_layers - 1)

    def other(done, total):
        if done == total:
            prune_checkpoint(model, out, smaller, scores)

    with pytest.raises(StorageError, match="someone else has made this folder meanwhile; the result is in") as caught:
        prune_checkpoint(model, out, target, scores, progress=other)
    kept = caught.value.problem.rsplit(" ", 1)[1]
    layers = [storage.manifest(str(folder))["note"]["architecture"]["num_layers"] for folder in (out, kept)]
    assert layers == [smaller.num_layers, target.num_layers]


def test_unreadable_checkpoints_are_refused_and_named(tmp_path):
    _, target, scores = on_disk(tmp_path / "model")
    place, weights = tmp_path / "model", tmp_path / "model/model.safetensors"

    def refused(match):
        with pytest.raises(InputError, match=match) as caught:
            prune_checkpoint(place, tmp_path / "out", target, scores)
        assert not (tmp_path / "out").exists()
        return caught.value.remedy

    state = load_file(weights)
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in state.items() if name != lost}, weights)
    assert "complete checkpoint" in refused(lost)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, weights)
    assert "tie_word_embeddings" in refused("config.json ties lm_head.weight")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("model.safetensors: cannot be read")
    weights.unlink()
    (place / "pytorch_model.bin").write_bytes(b"")
    assert "save_pretrained" in refused("it has pytorch_model.bin")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("elsewhere.safetensors")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    refused("quantised")
    (place / "config.json").unlink()
    refused("no config.json")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_removed_heads_are_merged_into_kept_heads_as_in_memory(family, sign, tmp_path):
    """Compared with a loop over ranks that implements the formula head_i + sign * (head_i - head_(2K-i+1))."""
    model, _, scores = on_disk(tmp_path / "model", family)
    base = tiny.architecture(model)
    target = replace(base, num_heads=6, hidden_size=48)  # 3 of 4 heads in each of 2 groups are kept
    reference = prune(model, base, scores)  # a copy
    in_group, keep, dim = 4, 3, base.head_dim
    for layer in range(base.num_layers):
        attention = reference.model.layers[layer].self_attn
        queries = attention.qkv_proj if family == "phi3" else attention.q_proj
        for tensor in (queries.weight, queries.bias):
            if tensor is None:
                continue
            before = tensor.detach().clone()
            for group in range(base.num_kv_heads):
                ranked = scores.heads[layer][group * in_group : (group + 1) * in_group].argsort(descending=True)
                rows = [slice((group * in_group + h) * dim, (group * in_group + h + 1) * dim) for h in ranked.tolist()]
                for i in range(2 * keep - in_group + 1, keep + 1):
                    mine, other = before[rows[i - 1]], before[rows[2 * keep - i]]
                    tensor.data[rows[i - 1]] = mine + sign * (mine - other)
    merged = prune(model, target, scores, merge_heads=sign)
    expected = prune(reference, target, scores)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]), name
    assert not torch.equal(
        *(
            made.get_submodule("model.layers.0.self_attn").state_dict()[q]
            for made in (merged, prune(model, target, scores))
            for q in ["qkv_proj.weight" if family == "phi3" else "q_proj.weight"]
        )
    )
    prune_checkpoint(tmp_path / "model", tmp_path / "out", target, scores, merge_heads=sign)
    assert same_logits(tmp_path / "out", merged)


@pytest.mark.parametrize(
    ("heads", "sign", "named"),
    [(6, 2, "merge_heads: 2"), (8, 1, "nothing to merge"), (2, 1, "4 query heads per KV group .* into 1")],
)
def test_invalid_head_merging_is_refused(heads, sign, named):
    model = tiny.model("mistral")
    base = tiny.architecture(model)
    with pytest.raises(InputError, match=named):
        prune(model, replace(base, num_heads=heads), tiny.scores(base), merge_heads=sign)


def test_iterative_pruning_scores_the_model_again_before_each_step():
    model, rows = tiny.model("llama"), tiny.rows()
    base = tiny.architecture(model)
    target = replace(base, **SMALLER)
    expected = model
    for shape in shapes_between(base, target, 2):
        removed = expected.config.num_hidden_layers - shape.num_layers
        expected = prune(expected, shape, estimate_importance(expected, rows, layers=LayerScoring(sizes=(removed,))))
    actual = prune_in_steps(model, target, rows, steps=2, layers=LayerScoring())
    assert tiny.architecture(actual) == target
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in actual.state_dict().items())
    once = prune_in_steps(model, target, rows, steps=1)
    assert torch.equal(
        once.state_dict()["lm_head.weight"],
        prune(model, target, estimate_importance(model, rows)).state_dict()["lm_head.weight"],
    )
    assert tiny.architecture(model) == base


@pytest.mark.parametrize(("family", "merge_heads"), [("llama", 1), ("gemma2", 0), ("qwen3_moe", 0)])
def test_a_source_writes_the_files_of_a_student_that_is_pruned_in_memory_without_loading_the_model(
    family, merge_heads, tmp_path, monkeypatch
):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    model, target, scores = on_disk(tmp_path / "float", family)  # in float32; the run computes in bfloat16
    save_model(model, tiny.tokenizer(), teacher)
    scores.save(tmp_path / "scores.safetensors")
    target = replace(target, num_heads=6, hidden_size=48)
    source = PruningSource(
        str(teacher), str(tmp_path / "scores.safetensors"), "bfloat16", depth="scattered", merge_heads=merge_heads
    )
    (tmp_path / "expected").mkdir()
    save_model(source.prune(source.load(), target), load_tokenizer(teacher), tmp_path / "expected")
    monkeypatch.setattr(PruningSource, "load", None)
    source.write_student(target, str(tmp_path / "student"))
    files = storage.manifest(str(tmp_path / "student"))["files"]
    assert {name: entry["sha256"] for name, entry in files.items()} == {
        path.name: storage.sha256(path) for path in (tmp_path / "expected").iterdir()
    }


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_sizes_between_the_steps_suit_the_grouped_multiplication_of_experts(family):
    # transformers' default, which refuses widths that are not multiples of 8; the tests' other models do without
    model = AutoModelForCausalLM.from_config(tiny.config(family, tied=True)).float().eval()
    target = replace(tiny.architecture(model), num_layers=3, hidden_size=40, intermediate_size=32, num_experts=2)
    student = prune_in_steps(model, target, tiny.rows(2), steps=3)
    assert tiny.architecture(student) == target
    assert student(tiny.rows(1)).logits.isfinite().all()

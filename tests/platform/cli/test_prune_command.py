"""`minitron prune`: its options, its results and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import fsspec
import pytest
import torch
from click.testing import CliRunner
from helpers import tiny
from helpers.command import run_minitron

from minitron import estimate_importance, prune, storage
from minitron.checkpoints.sample import checkpoint_sample, model_sample
from minitron.models import load_model
from minitron_platform.cli.commands import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint and its scores."""
    folder = tmp_path_factory.mktemp("prune")
    model = tiny.model("mistral", hidden_size=256, intermediate_size=512, num_attention_heads=8)
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.scores(tiny.architecture(model)).save(folder / "scores.safetensors")
    return folder


def call(folder, *arguments, out="out", model="model"):
    scores = [] if "--scores" in arguments else ["--scores", str(folder / "scores.safetensors")]
    return CliRunner().invoke(
        main, ["prune", str(folder / model), str(folder / out), *scores, *arguments], catch_exceptions=False
    )


def check(folder, out, scores=None, **changes):
    model = load_model(folder / "model")
    base = tiny.architecture(model)
    layers = changes.pop("layers", None)
    expected = prune(model, replace(base, **changes), tiny.scores(base), layers=layers)
    with torch.no_grad():
        assert torch.equal(load_model(folder / out)(tiny.rows()).logits, expected(tiny.rows()).logits)


def test_prune_to_given_sizes(folder):
    result = call(folder, "--hidden-size", "192", "--num-layers", "4", "--num-heads", "4", out="sizes")
    assert result.exit_code == 0, result.output
    check(folder, "sizes", hidden_size=192, num_layers=4, num_heads=4)
    base = tiny.architecture(load_model(folder / "model"))
    smaller = replace(base, hidden_size=192, num_layers=4, num_heads=4)
    for said in (f"{base.num_parameters:,}", f"{smaller.num_parameters:,}", "one tensor at a time", "peak memory"):
        assert said in result.output
    assert "KV cache" in " ".join(result.output.split())
    assert str(folder / "sizes") in result.output.replace("\n", "")


def test_prune_to_a_number_of_parameters(folder):
    base = tiny.architecture(load_model(folder / "model"))
    asked = round(base.num_parameters * 0.7)
    result = call(folder, "--parameters", str(float(asked)), "--multiple", "16", out="parameters")
    assert result.exit_code == 0, result.output
    made = tiny.architecture(load_model(folder / "parameters"))
    assert f"{made.num_parameters / asked - 1:+.1%} compared to the requested {asked:,} parameters" in result.output
    assert abs(made.num_parameters / asked - 1) < 0.05
    assert made.hidden_size % 16 == made.intermediate_size % 16 == 0
    result = call(folder, "--parameters", str(base.num_parameters * 0.81), "--how", "depth", out="deep")
    assert result.exit_code == 0, result.output
    assert tiny.architecture(load_model(folder / "deep")) == replace(base, num_layers=4)


def test_prune_to_given_layers(folder):
    result = call(folder, "--layers", "0-1,4", "--intermediate-size", "448", out="layers")
    assert result.exit_code == 0, result.output
    assert "layers kept: 0-1, 4 (as listed)" in result.output
    check(folder, "layers", num_layers=3, intermediate_size=448, layers=[0, 1, 4])


def test_prune_scattered_layers(folder):
    scores = tiny.scores(tiny.architecture(load_model(folder / "model")))
    result = call(folder, "--num-layers", "3", "--depth", "scattered", "--metric", "cosine", out="scattered")
    assert result.exit_code == 0, result.output
    check(folder, "scattered", num_layers=3, layers=sorted(scores.blocks(1, "cosine").topk(3).indices.tolist()))
    assert "(scattered, by cosine)" in result.output


def test_prune_prints_the_metric_by_which_layers_were_chosen(folder):
    scores = tiny.scores(tiny.architecture(load_model(folder / "model")))
    measured = {"loss": {2: torch.tensor([0.3, 0.1, 0.4, 0.2])}, "logit_error": {1: torch.tensor([5.0, 4, 3, 2, 1])}}
    replace(scores, removal=measured).save(folder / "measured.safetensors")

    def said(count, *arguments):
        out = f"said{count}{len(arguments)}"
        arguments = ("--num-layers", str(count), "--scores", str(folder / "measured.safetensors"), *arguments)
        result = call(folder, *arguments, out=out)
        assert result.exit_code == 0, result.output
        return next(line for line in result.output.splitlines() if line.startswith("layers kept"))

    assert said(3) == "layers kept: 0, 3-4 (contiguous, by loss)"
    assert said(4, "--metric", "logit_error") == "layers kept: 0-3 (contiguous, by logit_error)"
    cosine = "by cosine; the loss without 1 layer was not measured; --metric also accepts logit_error)"
    assert said(4).endswith(f"(contiguous, {cosine}")
    assert said(3, "--depth", "scattered").endswith(f"(scattered, {cosine}")
    assert said(2).endswith("(contiguous, by cosine; the loss without 3 layers was not measured)")


def test_prune_takes_the_newest_scores_of_a_storage(folder):
    calibrated = folder / "runs/stages/calibrate/abc"
    calibrated.mkdir(parents=True)
    shutil.copy(folder / "scores.safetensors", calibrated)
    result = call(folder, "--num-layers", "4", "--scores", str(folder / "runs"), out="stored")
    assert result.exit_code == 0, result.output
    assert f"scores {calibrated}/scores.safetensors" in " ".join(result.output.split())
    check(folder, "stored", num_layers=4)


def test_folders_without_scores_are_refused(folder):
    result = call(folder, "--num-layers", "4", "--scores", str(folder / "model"), out="refused")
    assert result.exit_code == 2
    assert "the folder has no stages/calibrate/*/scores.safetensors" in " ".join(result.output.split())
    with fsspec.open("memory://far/stages/calibrate/abc/scores.safetensors", "wb") as file:
        file.write((folder / "scores.safetensors").read_bytes())
    result = call(folder, "--num-layers", "4", "--scores", "memory://far", out="refused")
    assert result.exit_code == 2
    assert "memory://far is a remote folder" in " ".join(result.output.split())


def test_prune_reads_the_given_revision_of_a_hub_model_from_the_cache(folder, tmp_path, monkeypatch):
    """The cache has two revisions; their listings also name weights in other formats, which were not downloaded."""
    commits = {"main": "0" * 40, "v1": "1" * 40}
    cache = tmp_path / "models--somebody--model"
    shutil.copytree(folder / "model", cache / "snapshots" / commits["v1"])
    tiny.model("mistral").save_pretrained(cache / "snapshots" / commits["main"])
    (cache / "refs").mkdir()
    (cache / "trees").mkdir()
    for name, commit in commits.items():
        (cache / "refs" / name).write_text(commit)
        here = [file.name for file in (cache / "snapshots" / commit).iterdir()]
        others = ["consolidated.safetensors", "original/consolidated.00.safetensors", "onnx/model.json", "flax.msgpack"]
        listed = {file: {"size": 1, "blob_id": "2" * 40} for file in [*here, *others]}
        (cache / f"trees/{commit}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    arguments = ["--scores", str(folder / "scores.safetensors"), "--num-layers", "4"]

    def pruned(out, *more):
        return CliRunner().invoke(main, ["prune", "somebody/model", str(folder / out), *arguments, *more])

    result = pruned("hub", "--revision", "v1")
    assert result.exit_code == 0, result.output
    check(folder, "hub", num_layers=4)
    result = pruned("newest")
    assert result.exit_code == 2
    assert "but this model has neurons [5, 96]" in " ".join(result.output.split())
    result = pruned("none", "--revision", "v2")
    assert result.exit_code == 2
    assert "'somebody/model' at revision 'v2' is not a local folder" in " ".join(result.output.split())


def test_prune_merges_heads_on_request(folder):
    result = call(folder, "--num-heads", "6", "--merge-heads", "-1", out="merged")
    assert result.exit_code == 0, result.output
    model = load_model(folder / "model")
    base = tiny.architecture(model)
    expected = prune(model, replace(base, num_heads=6), tiny.scores(base), merge_heads=-1)
    with torch.no_grad():
        assert torch.equal(load_model(folder / "merged")(tiny.rows()).logits, expected(tiny.rows()).logits)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no option determines the shape"),
        (("--like", "minitron-4b", "--hidden-size", "64"), "--like and --hidden-size each determine the shape"),
        (
            ("--like", "mn-minitron-8b"),
            "pruned from Mistral NeMo 12B; this model differs from Mistral NeMo 12B in num_layers",
        ),
        (("--like", "minitron-9b"), "did you mean minitron-"),
        (("--parameters", "1e12"), "--parameters: 1,000,000,000,000"),
        (("--hidden-size", "512"), "--hidden-size: 512 is larger than the model's 256"),
        (("--layers", "0-x"), "'0-x' is not a layer or a range"),
        (("--layers", "0-9999999999"), "--layers: '0-9999999999' is not a layer or a range"),
        (("--layers", "0-999999999"), "--layers: 0-999999999 is not a range of layers"),
        (("--layers", "3-1,4"), "--layers: 3-1 is not a range of layers"),
        (("--layers", "3,1"), "is not in ascending order"),
        (("--layers", "0-9"), "--layers: the model has no layer 9, only 5 layers"),
        (("--layers", ""), "'' is not a layer or a range"),
        (("--num-layers", "8"), "--num-layers: 8 is larger than the model's 5"),
        (("--num-layers", "3", "--layers", "0-1"), "--layers: 0-1 are 2 layers, but --num-layers keeps 3"),
        (("--parameters", "2e6", "--layers", "0-1"), "--layers: 0-1 are 2 layers, but --parameters keeps 5"),
        (("--parameters", "nan"), "--parameters: nan is not a valid number of parameters"),
        (("--parameters", "inf"), "--parameters: inf is not a valid number of parameters"),
        (("--parameters", "0"), "--parameters: 0.0 is not a valid number of parameters"),
        (("--num-layers", "4", "--how", "depth"), "--how: depth has no effect without --parameters"),
        (("--like", "minitron-4b", "--multiple", "64"), "--multiple: 64 has no effect without --parameters"),
        (("--layers", "0-3", "--depth", "contiguous"), "--depth: contiguous has no effect with --layers"),
        (("--layers", "0-3", "--metric", "cosine"), "--metric: cosine has no effect with --layers"),
        (("--num-layers", "4", "--revision", "v1"), "--revision: v1 has no effect"),
        (("--num-layers", "4", "--metric", "taste"), "taste"),
        (("--num-heads", "8", "--merge-heads", "+1"), "nothing to merge"),
        (("--num-layers", "4", "--scores", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
    ],
)
def test_prune_refuses_invalid_options(folder, tmp_path, arguments, said):
    result = call(folder, *arguments, out=tmp_path / "refused")
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert "fix: " in result.output
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 6}, "heads [5, 6], but this model has heads [5, 8]"),
        ({"intermediate_size": 640}, "neurons [5, 640], but this model has neurons [5, 512]"),
        ({"hidden_size": 64}, "channels [64], but this model has channels [256]"),
        (
            {"family": "mixtral", "num_experts": 4, "experts_per_token": 2},
            "neurons [5, 4, 512], but this model has neurons [5, 512]",
        ),
    ],
)
def test_scores_of_another_model_are_refused(folder, tmp_path, changes, said):
    base = tiny.architecture(load_model(folder / "model"))
    tiny.scores(replace(base, **changes)).save(tmp_path / "other.safetensors")
    result = call(
        folder, "--num-layers", "4", "--scores", str(tmp_path / "other.safetensors"), out=tmp_path / "refused"
    )
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "refused").exists()


@pytest.fixture(scope="module")
def brothers(folder, tmp_path_factory):
    """Two models of one shape, base and tuned, the scores of each in a storage, and a smaller model with newer scores there."""
    runs = tmp_path_factory.mktemp("brothers")
    tuned = load_model(folder / "model")
    with torch.no_grad():
        tuned.model.layers[1].self_attn.q_proj.weight[0] *= 1.05
    tuned.save_pretrained(runs / "tuned")
    tiny.tokenizer().save_pretrained(runs / "tuned")
    others = {"base": load_model(folder / "model"), "tuned": tuned, "smaller": tiny.model("mistral")}
    for age, (name, model) in enumerate(others.items()):
        file = runs / "stages/calibrate" / name / "scores.safetensors"
        file.parent.mkdir(parents=True)
        estimate_importance(model, tiny.rows(2)).save(file)
        os.utime(file, (age, age))
    return runs


def test_scores_of_a_storage_are_chosen_by_the_model(folder, brothers):
    for name, model in (("base", folder / "model"), ("tuned", brothers / "tuned")):
        result = call(folder, "--num-layers", "4", "--scores", str(brothers), out=brothers / f"{name}-out", model=model)
        assert result.exit_code == 0, result.output
        assert f"scores {brothers}/stages/calibrate/{name}/scores.safetensors" in " ".join(result.output.split())
        assert "note" not in result.output.replace("KV", "")


def test_scores_of_a_model_of_the_same_shape_are_refused_unless_allowed(folder, brothers):
    scores = ("--scores", str(brothers / "stages/calibrate/base/scores.safetensors"))
    target = brothers / "refused"
    result = call(folder, "--num-layers", "4", *scores, out=target, model=brothers / "tuned")
    assert result.exit_code == 2
    assert "base/scores.safetensors was computed on a model of this shape with other weights" in result.output
    assert not target.exists()
    result = call(folder, "--num-layers", "4", *scores, "--allow-other-scores", out=target, model=brothers / "tuned")
    assert result.exit_code == 0, result.output
    assert "was computed on a model with other weights" in " ".join(result.output.split())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_has_the_same_sample_in_every_dtype(tmp_path, dtype):
    model = tiny.model("qwen3_moe", tied=False).to(dtype)
    model.save_pretrained(tmp_path)
    assert checkpoint_sample(tmp_path) == model_sample(model) == model_sample(model.float())


def test_a_target_inside_the_model_is_refused(folder):
    result = call(folder, "--num-layers", "4", out="model/pruned")
    assert result.exit_code == 2
    assert "is inside the model's folder" in result.output
    assert not (folder / "model/pruned").exists()


def test_scores_without_experts_are_refused_for_a_mixture(tmp_path):
    model = tiny.model("mixtral")
    model.save_pretrained(tmp_path / "model")
    replace(tiny.scores(tiny.architecture(model)), experts=None).save(tmp_path / "scores.safetensors")
    result = call(tmp_path, "--num-experts", "3")
    assert result.exit_code == 2
    assert "no experts, but this model has experts [5, 4]" in " ".join(result.output.split())


def test_prune_reads_and_writes_remote_storage(folder):
    model = storage.upload_files({path.name: path for path in (folder / "model").iterdir()}, "memory://prune")
    scores = ["--scores", str(folder / "scores.safetensors")]
    done = CliRunner().invoke(main, ["prune", model, "memory://prune/out", "--num-layers", "4", *scores])
    assert done.exit_code == 0, done.output
    shutil.copytree(storage.fetch("memory://prune/out"), folder / "remote")
    check(folder, "remote", num_layers=4)
    fsspec.filesystem("memory").pipe("/foreign/config.json", b"{}")
    for source, out, said in (
        (model, f"{model}/out", "is inside the model's folder"),
        ("memory://foreign", "memory://prune/other", "memory://foreign: not a folder that minitron wrote"),
    ):
        refused = CliRunner().invoke(main, ["prune", source, out, "--num-layers", "4", *scores])
        assert refused.exit_code == 2
        assert said in " ".join(refused.output.split())


def test_an_existing_target_folder_is_refused(folder):
    (folder / "mine").mkdir()
    result = call(folder, "--num-layers", "4", out="mine")
    assert result.exit_code == 2
    assert "mine exists" in result.output
    assert not list((folder / "mine").iterdir())
    empty = CliRunner().invoke(main, ["prune", str(folder / "model"), "", "--scores", "scores", "--num-layers", "4"])
    assert "OUT: is empty" in empty.output


def test_a_missing_model_is_refused(folder):
    result = call(folder, "--num-layers", "4", model="nothing")
    assert result.exit_code == 2
    assert "nothing does not exist" in result.output
    scores = str(folder / "scores.safetensors")
    result = CliRunner().invoke(
        main, ["prune", "nobody/nothing", str(folder / "x"), "--scores", scores, "--num-layers", "4"]
    )
    assert result.exit_code == 2
    assert "'nobody/nothing' is not a local folder or file" in " ".join(result.output.split())


def test_prune_works_as_a_program(folder):
    typed = ["prune", "model", "program", "--scores", "scores.safetensors", "--num-layers", "4"]
    done = run_minitron(*typed, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    check(folder, "program", num_layers=4)
    again = run_minitron(*typed, cwd=folder)
    assert again.returncode == 2
    assert "error: program exists" in again.stderr

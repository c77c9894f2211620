"""`minitron prune`: what the user gives, what comes out, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from click.testing import CliRunner

from minitron import prune
from minitron.models import load_model
from minitron_platform.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint and its scores."""
    folder = tmp_path_factory.mktemp("prune")
    model = tiny.model("mistral", hidden_size=256, intermediate_size=512, num_attention_heads=8)
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.scores(tiny.architecture(model)).save(folder / "scores.safetensors")
    return folder


def call(place, *arguments, out="out", model="model"):
    scores = [] if "--scores" in arguments else ["--scores", str(place / "scores.safetensors")]
    return CliRunner().invoke(
        main, ["prune", str(place / model), str(place / out), *scores, *arguments], catch_exceptions=False
    )


def check(place, out, scores=None, **changes):
    model = load_model(place / "model")
    base = tiny.architecture(model)
    layers = changes.pop("layers", None)
    expected = prune(model, replace(base, **changes), tiny.scores(base), layers=layers)
    with torch.no_grad():
        assert torch.equal(load_model(place / out)(tiny.rows()).logits, expected(tiny.rows()).logits)


def test_sizes(place):
    result = call(place, "--hidden-size", "192", "--num-layers", "4", "--num-heads", "4", out="sizes")
    assert result.exit_code == 0, result.output
    check(place, "sizes", hidden_size=192, num_layers=4, num_heads=4)
    base = tiny.architecture(load_model(place / "model"))
    smaller = replace(base, hidden_size=192, num_layers=4, num_heads=4)
    for said in (f"{base.num_parameters:,}", f"{smaller.num_parameters:,}", "one tensor at a time", "peak memory"):
        assert said in result.output
    assert "KV cache" in " ".join(result.output.split())
    assert str(place / "sizes") in result.output.replace("\n", "")


def test_parameters(place):
    base = tiny.architecture(load_model(place / "model"))
    asked = round(base.num_parameters * 0.7)
    result = call(place, "--parameters", str(float(asked)), "--multiple", "16", out="parameters")
    assert result.exit_code == 0, result.output
    made = tiny.architecture(load_model(place / "parameters"))
    assert f"{made.num_parameters / asked - 1:+.1%} of the {asked:,} parameters asked for" in result.output
    assert abs(made.num_parameters / asked - 1) < 0.05
    assert made.hidden_size % 16 == made.intermediate_size % 16 == 0
    result = call(place, "--parameters", str(base.num_parameters * 0.81), "--how", "depth", out="deep")
    assert result.exit_code == 0, result.output
    assert tiny.architecture(load_model(place / "deep")) == replace(base, num_layers=4)


def test_layers(place):
    result = call(place, "--layers", "0-1,4", "--intermediate-size", "448", out="layers")
    assert result.exit_code == 0, result.output
    assert "layers kept: 0-1, 4" in result.output
    check(place, "layers", num_layers=3, intermediate_size=448, layers=[0, 1, 4])


def test_scattered_layers(place):
    scores = tiny.scores(tiny.architecture(load_model(place / "model")))
    result = call(place, "--num-layers", "3", "--depth", "scattered", "--metric", "cosine", out="scattered")
    assert result.exit_code == 0, result.output
    check(place, "scattered", num_layers=3, layers=sorted(scores.blocks(1, "cosine").topk(3).indices.tolist()))


def test_merged_heads(place):
    result = call(place, "--num-heads", "6", "--merge-heads", "-1", out="merged")
    assert result.exit_code == 0, result.output
    model = load_model(place / "model")
    base = tiny.architecture(model)
    expected = prune(model, replace(base, num_heads=6), tiny.scores(base), merge_heads=-1)
    with torch.no_grad():
        assert torch.equal(load_model(place / "merged")(tiny.rows()).logits, expected(tiny.rows()).logits)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no shape is given"),
        (("--like", "minitron-4b", "--hidden-size", "64"), "--like and --hidden-size give the shape twice"),
        (
            ("--like", "mn-minitron-8b"),
            "cut from Mistral NeMo 12B; this model differs from Mistral NeMo 12B in num_layers",
        ),
        (("--like", "minitron-9b"), "did you mean minitron-"),
        (("--parameters", "1e12"), "parameters: 1,000,000,000,000"),
        (("--hidden-size", "512"), "hidden_size: 512 is larger than the model's 256"),
        (("--layers", "0-x"), "'0-x' is not a layer or a range"),
        (("--layers", "3,1"), "does not ascend"),
        (("--layers", "0-9"), "num_layers: 10 is larger"),
        (("--num-layers", "3", "--layers", "0,1"), "layers"),
        (("--num-layers", "4", "--metric", "taste"), "taste"),
        (("--num-heads", "8", "--merge-heads", "+1"), "nothing to merge"),
        (("--num-layers", "4", "--scores", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
    ],
)
def test_refusals(place, arguments, said):
    result = call(place, *arguments, out="refused")
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert "fix: " in result.output
    assert not (place / "refused").exists()


def test_other_models_scores_are_refused(place):
    other = tiny.scores(tiny.architecture(tiny.model("mistral")))
    other.save(place / "other.safetensors")
    result = call(place, "--num-layers", "4", "--scores", str(place / "other.safetensors"), out="refused")
    assert result.exit_code == 2
    assert "has heads [5, 8]" in result.output or "has channels [64] where this model has [256]" in result.output


def test_a_folder_that_exists_is_refused(place):
    (place / "mine").mkdir()
    result = call(place, "--num-layers", "4", out="mine")
    assert result.exit_code == 2
    assert "mine exists" in result.output
    assert not list((place / "mine").iterdir())


def test_a_model_that_is_nowhere_is_refused(place):
    result = call(place, "--num-layers", "4", model="nothing")
    assert result.exit_code == 2
    assert "nothing does not exist" in result.output
    scores = str(place / "scores.safetensors")
    result = CliRunner().invoke(
        main, ["prune", "nobody/nothing", str(place / "x"), "--scores", scores, "--num-layers", "4"]
    )
    assert result.exit_code == 2
    assert "'nobody/nothing' is no local folder or file" in " ".join(result.output.split())


def test_as_a_program(place):
    command = [sys.executable, "-m", "minitron_platform", "prune", "model", "program", "--scores", "scores.safetensors"]
    done = subprocess.run([*command, "--num-layers", "4"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    check(place, "program", num_layers=4)
    again = subprocess.run([*command, "--num-layers", "4"], cwd=place, capture_output=True, text=True)
    assert again.returncode == 2
    assert "error: program exists" in again.stderr

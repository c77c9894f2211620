"""The output and the plots of `minitron importance`, and the figures in them."""

from __future__ import annotations

import io
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import tiny
from PIL import Image
from scipy.stats import spearmanr

from minitron import estimate_importance
from minitron.importance import LayerScoring
from minitron.importance.compare import kept_overlap, rank_correlation, top_half_share
from minitron_platform.cli.commands import main

SCORINGS = [LayerScoring(sizes=(1, 2), iterative=1, keep=3), LayerScoring("logit_error", sizes=(3,))]


@pytest.fixture(scope="module")
def scores():
    return estimate_importance(tiny.model(), tiny.rows(4), layers=SCORINGS)


@pytest.fixture(scope="module")
def storage(scores, tmp_path_factory):
    """The storage of a run, with an older calibration of another model."""
    folder = tmp_path_factory.mktemp("runs")
    mixture = estimate_importance(tiny.model("mixtral"), tiny.rows(4))
    for name, age, made in (("old", 100, mixture), ("new", 0, scores)):
        place = folder / "stages" / "calibrate" / name
        place.mkdir(parents=True)
        made.save(place / "scores.safetensors")
        os.utime(place / "scores.safetensors", (1_000_000 - age, 1_000_000 - age))
    return folder


def _run(*arguments):
    result = CliRunner().invoke(main, ["importance", *map(str, arguments)], env={"COLUMNS": "200"})
    return result, " ".join(result.output.split())


def test_the_newest_scores_of_a_storage_are_shown(storage, scores):
    result, text = _run("show", storage)
    assert result.exit_code == 0
    assert f"older: {storage}/stages/calibrate/old/scores.safetensors" in result.output.replace("\n", "")
    assert "seq_length 16" in text
    assert "layers by logit_error (all rows)" in text
    loss = scores.blocks(1, "loss")
    for layer in range(5):
        row = next(line for line in result.output.splitlines() if line.startswith(f"│ {layer} "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        order = scores.orders["loss"][1]
        step = f"{order.index(layer) + 1}." if layer in order else "kept"
        assert cells[2:] == [f"{loss[layer]:.4f}", f"{loss[layer].exp():,.2f}", step]
    start = int(scores.blocks(3, "logit_error").argmin())
    assert f"│ logit error without │ 3 │ {start}-{start + 2} │ {scores.blocks(3, 'logit_error')[start]:.4f}" in text
    share = top_half_share(scores.channels[None])
    assert f"│ channels │ 64 │ {100 * float(share):.1f} %" in text


def test_a_mixture_shows_its_experts(storage):
    _, text = _run("show", storage / "stages/calibrate/old/scores.safetensors")
    assert "│ experts │ 4 │" in text
    assert "│ neurons │ 96 │" in text


@pytest.mark.parametrize("which", ["old", "new"])
def test_the_curves_are_drawn_to_a_file(storage, tmp_path, which):
    picture = tmp_path / "curves.png"
    result, _ = _run("show", storage / f"stages/calibrate/{which}/scores.safetensors", "--plot", picture)
    assert result.exit_code == 0
    pixels = np.asarray(Image.open(io.BytesIO(picture.read_bytes())).convert("RGB"))
    upper, lower = np.array_split(pixels, 2)
    green = np.array([0x76, 0xB9, 0x00])
    for half in (upper, lower):  # the upper half shows blocks of layers, the lower half units
        assert (np.abs(half.astype(int) - green).sum(-1) < 8).sum() > 200


def test_a_calibration_agrees_with_itself_and_not_with_its_reverse(storage, scores, tmp_path):
    new = storage / "stages/calibrate/new/scores.safetensors"
    result, text = _run("compare", new, storage)
    assert result.exit_code == 0
    assert "│ heads │ 1.000 │ 1.000 │ 100.0 % │ 100.0 % │" in text
    assert "│ no │" not in text
    blocks = {"loss": {**scores.removal["loss"], 2: -scores.removal["loss"][2]}}
    opposite = replace(scores, neurons=scores.neurons.neg(), removal=blocks)
    opposite.save(tmp_path / "opposite.safetensors")
    _, text = _run("compare", new, tmp_path / "opposite.safetensors")
    assert "│ neurons │ -1.000 │ -1.000 │ 0.0 % │ 0.0 % │" in text
    assert "│ channels │ 1.000 │ │ 100.0 % │ │" in text
    assert "│ no │ -1.000 │" in text


def test_comparing_calibrations_of_different_architectures_is_refused(storage):
    result, text = _run("compare", storage, storage / "stages/calibrate/old/scores.safetensors")
    assert result.exit_code == 2
    assert "scores of models of two shapes" in text


def test_a_folder_without_scores_is_refused(tmp_path):
    result, text = _run("show", tmp_path)
    assert result.exit_code == 2
    assert "the folder has no stages/calibrate/*/scores.safetensors" in text


def test_rank_correlation_averages_tied_ranks():
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = torch.randint(0, 6, (2, 30), generator=draw).float()
        assert abs(rank_correlation(a, b) - spearmanr(a, b).statistic) < 1e-12


def test_overlap_and_concentration_are_those_of_the_better_half():
    a = torch.tensor([9.0, 5.0, 1.0, 1.0])
    assert float(top_half_share(a)) == 14 / 16
    assert kept_overlap(a, torch.tensor([3.0, 0.0, 2.0, 1.0])) == 0.5

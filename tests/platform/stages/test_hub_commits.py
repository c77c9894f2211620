"""A teacher and a text from the hub are those of the commits in the fingerprints, whatever is pushed meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.command import ROOT, environment
from safetensors.torch import load_file, save_file

from minitron.data import Rows
from minitron.models import load_tokenizer

RUN = """
import os, sys
from pathlib import Path
from helpers.hub_server import hub_server

def files(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}

with hub_server() as hub:
    hub.files = files("first")
    os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": "cache", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    from minitron_platform import load_recipe
    from minitron_platform.pipeline import run
    from minitron_platform.stages.order import STAGES

    recipe, name, *settings = sys.argv[1:]
    stage = type(next(stage for stage in STAGES if stage.name == name))
    own = stage.run

    def after_a_push(self, context, folder):
        hub.push(files("second"))
        return own(self, context, folder)

    stage.run = after_a_push
    run(load_recipe(recipe, ["resources.workers=1", *settings]), storage_path="runs", until=name)
    print([*hub.earlier, hub.commit])
"""


@pytest.fixture
def run_with_a_push(bench, tmp_path):
    """A function that runs a recipe until a stage, before which the folder `second` replaces `first` on the hub."""

    def run(stage, *settings):
        variables = environment()
        variables["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'tests'}"
        command = [sys.executable, "-c", RUN, str(bench / "recipe.yaml"), stage, *settings]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert f"['{'1' * 40}', '{'2' * 40}']" in done.stdout

    return run


def test_the_teacher_is_the_commit_that_was_identified(run_with_a_push, bench, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(bench / "teacher", tmp_path / name)
    weights = tmp_path / "second" / "model.safetensors"
    first = load_file(weights)
    save_file({name: 2 * value for name, value in first.items()}, weights, {"format": "pt"})
    run_with_a_push("teacher", "teacher.model=me/model")
    (stored,) = tmp_path.glob("runs/stages/teacher/*/model/model.safetensors")
    stored = load_file(stored)
    assert all(torch.equal(stored[name], value) for name, value in first.items())


def test_the_text_is_that_of_the_commit_that_was_identified(run_with_a_push, bench, tmp_path):
    for name, words in (("first", "river light "), ("second", "stone cloud ")):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": words * length}) + "\n" for length in range(1, 100)]
        (tmp_path / name / "text.jsonl").write_text("".join(lines))
    run_with_a_push("data", "data.kind=hub", "data.path=me/text")
    (folder,) = tmp_path.glob("runs/stages/data/*/rows")
    text = load_tokenizer(bench / "teacher").decode(Rows.open(str(folder), "train").take([0])[0]).replace(" ", "")
    assert "river" in text
    assert "stone" not in text

"""Checkpoint folders load with transformers alone, in another process and as another user."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny
from transformers import AutoModelForCausalLM

from minitron import prune, storage
from minitron.models import load_model, load_source, save_model
from minitron.pruning.streaming import prune_checkpoint

FOREIGN = {
    "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    "architectures": ["OwnForCausalLM"],
}

# First as the current user, which imports everything; then as `nobody`.
LOAD = """
import os, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
def load(**trust):
    for folder in sys.argv[1:]:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
        assert not any(info.values()), (folder, info)
        assert AutoTokenizer.from_pretrained(folder, **trust)("a").input_ids
        print(type(model).__name__)
load(trust_remote_code=True)
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
load()
assert os.getuid() != 0
"""


@pytest.fixture
def open_folder():
    """A folder that other users may enter, unlike the temporary folders of pytest."""
    before, folder = os.umask(0o022), Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


def foreign(folder, family):
    """A checkpoint with custom modelling code in its folder, like many on the hub."""
    tiny.model(family).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    for name, values in (
        ("config.json", FOREIGN),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def test_folders_of_every_family_load_with_transformers_alone_as_another_user(open_folder, tmp_path):
    written, names = [], []
    for family in tiny.FAMILIES:
        foreign(tmp_path / family, family)
        teacher, tokenizer = load_source(str(tmp_path / family))
        base = tiny.architecture(teacher)
        smaller = replace(base, num_layers=3, intermediate_size=48)
        scores = tiny.scores(base)
        for kind, model in (("teacher", teacher), ("student", prune(teacher, smaller, scores))):
            with storage.committed_folder(str(open_folder / f"{kind}-{family}")) as folder:
                save_model(model, tokenizer, folder)
        prune_checkpoint(tmp_path / family, open_folder / f"streamed-{family}", smaller, scores)
        written += [open_folder / f"{kind}-{family}" for kind in ("teacher", "student", "streamed")]
        names += [type(teacher).__name__] * 3
    for folder, name in zip(written, names, strict=True):
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [name]
        assert "auto_map" not in (folder / "config.json").read_text() + (folder / "tokenizer_config.json").read_text()
        for path in (folder, *folder.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, written)],
        env={**os.environ, "PYTHONPATH": "", "HOME": str(open_folder), "HF_HUB_OFFLINE": "1"},
        cwd=open_folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == 2 * names


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o077, 0o600, 0o700), (0o007, 0o660, 0o770)])
def test_the_umask_determines_who_may_read_a_folder(umask, file, folder, open_folder, tmp_path):
    model = tiny.model()
    os.umask(umask)
    tiny.scores(tiny.architecture(model)).save(tmp_path / "scores.safetensors")
    with storage.committed_folder(str(open_folder / "student")) as place:
        save_model(model, tiny.tokenizer(), place)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (open_folder / "student").iterdir()}
    assert modes == {file}
    assert stat.S_IMODE((open_folder / "student").stat().st_mode) == folder
    assert stat.S_IMODE((tmp_path / "scores.safetensors").stat().st_mode) == file
    assert isinstance(load_model(open_folder / "student"), type(AutoModelForCausalLM.from_config(model.config)))

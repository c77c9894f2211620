"""The identity of a teacher depends on everything that determines its outputs, and not on where and how it was saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import tiny
from helpers.command import environment
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from minitron.checkpoints.identity import checkpoint_identity
from minitron.models import load_model, load_tokenizer

# the work of the teacher stage, in a process with or without access to the hub
WRITE = """
import sys
from pathlib import Path
from minitron.checkpoints.identity import checkpoint_identity
from minitron.models import load_source, load_tokenizer, save_model
source, target = sys.argv[1:]
save_model(*load_source(source), Path(target))
print(checkpoint_identity(Path(target), load_tokenizer(target)))
"""


def identity(folder):
    return checkpoint_identity(folder, load_tokenizer(folder))


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "one"
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_the_identity_of_a_teacher_is_the_same_with_and_without_access_to_the_hub(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "elsewhere")
    rewrite(tmp_path / "elsewhere/config.json", transformers_version="4.40.1", _name_or_path="/home/somebody/model")
    ids = []
    for offline, source in (("0", teacher), ("1", tmp_path / "elsewhere")):
        target = tmp_path / f"written-{offline}"
        target.mkdir()
        written = subprocess.run(
            [sys.executable, "-c", WRITE, str(source), str(target)],
            env=environment() | {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert written.returncode == 0, written.stderr
        ids.append(written.stdout.split()[-1])
    assert ids[0] == ids[1]
    settings = [(tmp_path / f"written-{offline}/tokenizer_config.json").read_text() for offline in "01"]
    assert settings[0] == settings[1]
    assert "local" not in settings[0]


SAME = {
    "versions and paths": lambda folder: rewrite(
        folder / "config.json", transformers_version="4.40.1", _name_or_path="/a/b", architectures=None
    ),
    "another spelling of the dtype": lambda folder: rewrite(folder / "config.json", torch_dtype="float32"),
    "RoPE as older configs have it": lambda folder: rewrite(
        folder / "config.json", rope_parameters=None, rope_theta=10_000.0
    ),
    "what somebody added": lambda folder: rewrite(folder / "config.json", unsloth_version="1"),
    "use of the cache": lambda folder: rewrite(folder / "config.json", use_cache=False),
    "the machine that saved the tokenizer": lambda folder: rewrite(
        folder / "tokenizer_config.json", local_files_only=True, is_local=True
    ),
    "a chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "generation settings": lambda folder: rewrite(folder / "generation_config.json", temperature=0.7, do_sample=True),
    "times of files": lambda folder: os.utime(folder / "model.safetensors", (0, 0)),
    "shards": lambda folder: load_model(folder).save_pretrained(folder, max_shard_size="60KB"),
}


def change_weight(folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] += 2**-20
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_rope(folder, **rope):
    rewrite(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, **rope})


def change_vocabulary(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    first, second = sorted(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(values))


OTHER = {
    "one weight": change_weight,
    "the weights' dtype": lambda folder: load_model(folder, torch.bfloat16).save_pretrained(folder),
    "the norms' epsilon": lambda folder: rewrite(folder / "config.json", rms_norm_eps=1e-5),
    "RoPE's base": lambda folder: change_rope(folder, rope_theta=500_000.0),
    "RoPE's kind": lambda folder: change_rope(folder, rope_type="linear", factor=2.0),
    "the activation": lambda folder: rewrite(folder / "config.json", hidden_act="gelu"),
    "the vocabulary": change_vocabulary,
    "the special tokens": lambda folder: rewrite(folder / "tokenizer_config.json", bos_token="a"),
}


@pytest.mark.parametrize(("change", "same"), [*((c, True) for c in SAME), *((c, False) for c in OTHER)])
def test_changes_that_affect_the_outputs_change_the_identity_and_others_do_not(change, same, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "other")
    (SAME if same else OTHER)[change](folder)
    assert (identity(folder) == identity(teacher)) is same


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_norms_and_rope_settings_of_every_family_are_part_of_the_identity(family, tmp_path):
    tiny.model(family).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    before = identity(tmp_path)
    assert identity(tmp_path) == before
    config = AutoConfig.from_pretrained(tmp_path)
    epsilon = "norm_eps" if family == "nemotron" else "rms_norm_eps"
    rewrite(tmp_path / "config.json", **{epsilon: getattr(config, epsilon) * 2})
    middle = identity(tmp_path)
    rope = dict(config.rope_parameters)
    if family == "gemma3_text":
        rope["full_attention"] = {**rope["full_attention"], "rope_theta": 7.0}
    else:
        rope["rope_theta"] = 7.0
    rewrite(tmp_path / "config.json", rope_parameters=rope)
    assert len({before, middle, identity(tmp_path)}) == 3

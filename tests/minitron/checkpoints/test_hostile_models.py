"""A stranger's model: nothing of the user's is read through it, and nothing large is built before it is checked."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny
from safetensors.torch import load_file

from minitron.errors import InputError, MinitronError
from minitron.models import check_source, load_model, load_source, load_tokenizer, source_architecture
from minitron.packages import package_path
from minitron.pruning.streaming import prune_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny.model()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A model's folder to which a stranger has added something."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/a.jinja"]
)
def test_a_link_out_of_a_model_is_named_and_what_it_leads_to_is_not_copied(folder, tmp_path, name):
    (tmp_path / "id_rsa").write_text("private")
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "id_rsa")
    architecture = tiny.architecture(tiny.model())
    smaller, scores = replace(architecture, num_layers=3), tiny.scores(architecture)
    for read in (
        lambda: check_source(str(folder)),
        lambda: load_source(str(folder)),
        lambda: load_tokenizer(folder),
        lambda: prune_checkpoint(folder, tmp_path / "pruned", smaller, scores),
    ):
        with pytest.raises(InputError, match=f"{name}: a link to .*id_rsa, which is not part of the model"):
            read()
    assert not (tmp_path / "pruned").exists()


def test_the_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    load_source(str(snapshot))
    architecture = tiny.architecture(tiny.model())
    prune_checkpoint(snapshot, tmp_path / "pruned", replace(architecture, num_layers=3), tiny.scores(architecture))
    assert not (tmp_path / "pruned" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("path", ["../minitron/models.py", "/etc/passwd", "inner/../../yaml/loader.py"])
def test_a_package_address_stays_in_its_package(path):
    with pytest.raises(InputError, match="leads out of the package"):
        package_path(f"package:yaml/{path}")
    assert package_path("package:yaml/loader.py").exists()


FLOODS = {
    "labels": {"num_labels": 3 * 10**8},
    "labels of a section": {"text_config": {"model_type": "llama", "num_labels": 3 * 10**8}},
    "layers": {"num_hidden_layers": 10**7},
    "size of 100 bits": {"hidden_size": 10**30},
    "size as a float": {"intermediate_size": 1e300},
    "infinite size": {"vocab_size": float("inf")},
    "number of 10,000 bits": {"rope_theta": 2**10_000},
    "experts": {"num_local_experts": 4000, "num_hidden_layers": 4000},
}


def _change(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _traced(function):
    """The largest number of bytes that Python allocated meanwhile."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("flood", FLOODS)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(folder, flood):
    _change(folder, FLOODS[flood])

    def read():
        for read in (source_architecture, load_model):
            with pytest.raises(InputError, match=r"config\.json: "):
                read(str(folder))

    assert _traced(read) < 20 << 20


@pytest.mark.parametrize(
    "content", ["[" * 10**6, '{"a":' * 10**6, '{"num_labels": ' + "9" * 10**5 + "}", " " * (17 << 20)]
)
def test_a_config_that_cannot_be_one_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize(
    "value", ["stranger/kernel", "stranger/kernel@main:function", {"": "stranger/kernel"}], ids=str
)
def test_a_config_cannot_name_code_to_download(folder, key, value, monkeypatch):
    def download(*arguments, **named):
        raise AssertionError(f"downloads {arguments}")

    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", download)
    for changes in ({key: value}, {"text_config": {key: value}}):
        _change(folder, changes)
        for read in (load_source, load_model, source_architecture):
            with pytest.raises(
                InputError, match=f"{key}: .* (code that transformers would download|depends on the machine)"
            ):
                read(str(folder))


def test_weights_are_read_as_safetensors_alone(folder):
    state = load_file(folder / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in state.items()}, folder / "pytorch_model.bin")
    for model in (load_source(str(folder))[0], load_model(folder)):
        assert torch.equal(model.state_dict()["model.norm.weight"], state["model.norm.weight"])
    (folder / "model.safetensors").unlink()  # of a checkpoint in a storage, which always has it
    with pytest.raises((OSError, MinitronError), match="safetensors"):
        load_model(folder)


def _string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf(tensors=0, pairs=(), count=None, entries=b"", magic=b"GGUF"):
    count = len(pairs) if count is None else count
    return magic + struct.pack("<IQQ", 3, tensors, count) + b"".join(pairs) + entries + bytes(64)


ARCHITECTURE = _string("general.architecture") + struct.pack("<I", 8) + _string("llama")
LIES = {
    "tensors": _gguf(tensors=2**62),
    "keys": _gguf(count=2**62),
    "length of a key": _gguf(pairs=[struct.pack("<Q", 2**62)]),
    "length of a text": _gguf(pairs=[_string("a") + struct.pack("<IQ", 8, 2**63)]),
    "length of an array": _gguf(pairs=[_string("a") + struct.pack("<IIQ", 9, 0, 2**40)]),
    "length of an array of texts": _gguf(pairs=[_string("a") + struct.pack("<IIQ", 9, 8, 2**40)]),
    "array of arrays": _gguf(pairs=[_string("a") + struct.pack("<IIQIQ", 9, 9, 2**20, 9, 2**20)]),
    "type": _gguf(pairs=[_string("a") + struct.pack("<I", 77)]),
    "layers": _gguf(pairs=[ARCHITECTURE, _string("llama.block_count") + struct.pack("<II", 4, 10**7)]),
    "size": _gguf(pairs=[ARCHITECTURE, _string("llama.embedding_length") + struct.pack("<IQ", 10, 2**63)]),
    "dimensions": _gguf(tensors=1, entries=_string("x") + struct.pack("<I", 2**31)),
    "shape": _gguf(tensors=1, entries=_string("x") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
    "offset": _gguf(tensors=1, entries=_string("x") + struct.pack("<IQIQ", 1, 4, 0, 2**60)),
    "magic": _gguf(magic=b"GGML"),
    "empty": b"",
    "short": b"GGUF\x03",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_gguf_file_whose_counts_and_lengths_lie_is_refused_before_it_is_read(tmp_path, lie):
    path = tmp_path / "model.gguf"
    path.write_bytes(LIES[lie])

    def read():
        for read in (source_architecture, load_source):
            with pytest.raises(InputError, match="is not a whole GGUF file"):
                read(str(path))

    assert _traced(read) < 20 << 20

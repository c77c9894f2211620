"""Checkpoint folders that are odd are refused in one sentence, as early as it can be seen; harmless oddities are accepted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny
from transformers import AutoTokenizer

from minitron import storage
from minitron.checkpoints.tokenizer_files import check_tokenizer_fits
from minitron.errors import InputError, MinitronError, StorageError
from minitron.models import check_contents, load_source, source_architecture, source_tokenizer
from minitron_platform.planning.plan import plan
from minitron_platform.recipes.load import load_recipe

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0\nsize 12345\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    words = tiny.tokenizer()
    tiny.model(vocab_size=len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def configure(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value != "left out"})
    )


ODD_CONFIGS = {
    "heads that do not divide": (
        {"head_dim": "left out", "num_attention_heads": 5},
        "The hidden size .64. is not a multiple",
    ),
    "an odd head_dim": ({"head_dim": 7}, "RoPE requires an even rotary dimension"),
    "no finite norm": ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan is not a finite number"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: 0 is not a valid size"),
    "a number as text": ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
    "a number as a float": ({"num_hidden_layers": 5.0}, "Field 'num_hidden_layers' expected int, got float"),
    "not a number": ({"vocab_size": float("nan")}, "vocab_size: nan is not a finite number"),
    "the dtype auto": ({"dtype": "auto"}, "dtype: 'auto' is not a floating-point dtype"),
    "an unknown dtype": ({"torch_dtype": "int3"}, "torch_dtype: 'int3' is not a floating-point dtype"),
    "attention of a package": ({"_attn_implementation": "kernels/x"}, "_attn_implementation: 'kernels/x' depends on"),
    "padding outside the vocabulary": (
        {"pad_token_id": 300},
        "pad_token_id: 300 is outside the vocabulary of 300 tokens",
    ),
    "an unknown RoPE": ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "no RoPE of type 'su'"),
    "a RoPE of text": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}},
        "rope_theta: '1e4' is not a",
    ),
    "a RoPE that is no section": ({"rope_parameters": "default"}, "rope_parameters: 'default' is not a section"),
    "an unknown activation": ({"hidden_act": "shiny"}, "no activation function 'shiny'"),
    "a quantisation that is no section": (
        {"quantization_config": "int4"},
        "quantization_config: 'int4' is not a section",
    ),
    "layer types of another depth": (
        {"layer_types": ["full_attention"]},
        r"must be equal to the number of `layer_types`",
    ),
    "a model inside it": ({"text_config": {"model_type": "llama"}}, "wraps the text model 'llama'"),
}


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_an_odd_config_is_refused_before_weights_are_read(folder, case):
    changes, problem = ODD_CONFIGS[case]
    configure(folder, **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=problem) as refused:
        source_architecture(str(folder))
    assert len(refused.value.problem.splitlines()) == 1


@pytest.mark.parametrize("text", ["null", "[]", "3", "", "[" * 100_000, '{"a": '])
def test_a_config_that_is_no_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        source_architecture(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": 3},
        {"pad_token_id": -1},
        {"architectures": 3},
    ],
)
def test_what_does_not_concern_the_model_is_accepted(folder, sound, changes):
    configure(folder, **changes)
    model, _ = load_source(str(folder))
    expected, _ = load_source(str(sound))
    rows = tiny.rows(2)
    assert torch.equal(model(rows).logits, expected(rows).logits)
    assert model.config._attn_implementation == expected.config._attn_implementation


def test_a_pipe_or_device_is_refused_before_it_is_read(folder, tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=r"model.gguf: is not a file"):
        load_source(str(tmp_path / "model.gguf"))
    with pytest.raises(StorageError, match=r"is a pipe or device"):
        storage.read_json(str(tmp_path / "model.gguf"))
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors is a pipe or device"):
        load_source(str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_refused_by_its_name(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(InputError, match=rf"{name} is a pointer of Git LFS") as refused:
        source_architecture(str(folder))
    assert "git lfs pull" in refused.value.remedy


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(tiny.model().state_dict(), file)
    return file


def test_weights_in_a_damaged_bin_file_are_refused_without_unpickling(folder):
    file = pickled(folder)
    check_contents(str(folder))
    content = file.read_bytes()
    for damaged in (b"", b"not a pickle", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"pytorch_model\.bin: is not a file of torch\.save"):
            check_contents(str(folder))


def test_weights_of_another_shape_in_a_bin_file_are_refused_by_their_names(folder):
    pickled(folder)
    configure(folder, intermediate_size=80)
    with pytest.raises(InputError, match=r"mlp\.down_proj\.weight is \[64, 96\], not \[64, 80\]") as refused:
        load_source(str(folder))
    assert "ignore_mismatched_sizes" not in str(refused.value)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (
            {"weight_map": {"a": "shard-1", "b": "shard-2"}},
            "of the 2 files that it names, 2 are missing, such as 'shard-1'",
        ),
        ({"weight_map": {"a": "../config.json"}}, r"such as '\.\./config\.json'"),
        ({"weight_map": []}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_folder_is_refused(folder, kind, contents, problem):
    (folder / "model.safetensors").unlink()
    (folder / f"{kind}.index.json").write_text(json.dumps(contents))
    with pytest.raises(InputError, match=problem):
        check_contents(str(folder))


def test_a_tokenizer_of_another_format_names_the_package_that_it_needs(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(InputError, match=r"only tokenizer\.model, .* without the package sentencepiece"):
        source_tokenizer(str(folder))
    (folder / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="the folder has no tokenizer"):
        source_tokenizer(str(folder))


@pytest.mark.parametrize(("name", "text"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")])
def test_a_damaged_tokenizer_is_refused(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match="the tokenizer cannot be read"):
        source_tokenizer(str(folder))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_by_plan(folder, bench, tmp_path):
    shutil.copytree(bench / "teacher", folder, dirs_exist_ok=True)
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["<new>", "<newer>"])
    words.save_pretrained(folder)
    recipe = load_recipe(bench / "recipe.yaml", [f"teacher.model={folder}"])
    with pytest.raises(InputError, match=r"^teacher\.model: .* 2 tokens beyond .* vocabulary of 300 \('<new>' = 300, "):
        plan(recipe, storage_path=tmp_path / "runs")
    check_tokenizer_fits(words, 302, "")


def test_a_name_that_is_no_folder_is_refused_at_once_where_the_hub_does_not_answer(monkeypatch):
    def no_retries(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s before it asks again")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", no_retries)
    for name in ("nothing-here", "nobody/nothing-here", "x" * 5000):
        with pytest.raises(InputError, match=r"and the hub cannot be reached|no model"):
            source_architecture(name)


@pytest.mark.parametrize(("source", "problem"), [("text.jsonl", "is a file"), ("s3://", "names no bucket")])
def test_what_is_neither_a_folder_nor_a_gguf_file_is_refused(bench, source, problem):
    with pytest.raises(MinitronError, match=problem):
        source_architecture(source if "://" in source else str(bench / source))

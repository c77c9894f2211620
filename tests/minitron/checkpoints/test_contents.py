"""Checkpoints whose tensors do not match their model are refused, in memory and streaming; others load as in transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from click.testing import CliRunner
from helpers import tiny
from helpers.command import environment
from helpers.fp8_checkpoint import fp8_config, in_fp8
from helpers.refusals import refused_alike
from helpers.serving import serving
from safetensors.torch import load_file, save_file

from minitron.errors import InputError
from minitron.meta_models import open_model
from minitron.models import check_contents, load_model, load_source, plain_folder, save_model
from minitron.pruning.streaming import prune_checkpoint
from minitron_platform.cli.commands import main

LAYER = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def without(end):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.endswith(end)}


def plus(name, *shape):
    return lambda state: {**state, name: torch.zeros(shape)}


def as_dtype(dtype):
    return lambda state: {name: tensor.to(dtype) if tensor.ndim == 2 else tensor for name, tensor in state.items()}


def written(folder, family="llama", tied=True, change=lambda state: state, config=None, **shape):
    """Save a tiny model with changed tensors and config; returns the model without the changes."""
    model = tiny.model(family, tied, **shape)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in change(load_file(weights)).items()}
    save_file(state, weights, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | (config or {})))
    return model


def same(loaded, model):
    with torch.no_grad():
        return torch.equal(loaded.eval()(tiny.rows()).logits, model(tiny.rows()).logits)


FP8 = fp8_config()
# the change of the tensors, the change of the config, the text of the error, and the remedy
TAMPERED = {
    "a tensor missing": (without(LAYER), {}, f"1 missing ({LAYER})", "complete checkpoint"),
    "a tensor too many": (
        plus("model.adapter.weight", 2),
        {},
        "the model does not have (model.adapter.weight)",
        "complete",
    ),
    "another shape": (plus("model.norm.weight", 3), {}, "model.norm.weight is [3], not [64]", "complete"),
    "DistributedDataParallel": (prefixed("module."), {}, "names begin with 'module.'", "remove 'module.' from"),
    "torch.compile": (prefixed("_orig_mod."), {}, "names begin with '_orig_mod.'", "inside the wrapper"),
    "a multimodal model": (prefixed("language_model."), {}, "inside a larger one", "docs/adding-a-family.md"),
    "adapters": (plus("model.layers.0.mlp.up_proj.lora_A.weight", 4, 64), {}, "adapters", "merge_and_unload"),
    "fewer layers": (
        lambda state: state,
        {"num_hidden_layers": 6},
        "make 5 layers, but num_hidden_layers is 6",
        "complete",
    ),
    "more layers": (
        lambda state: state,
        {"num_hidden_layers": 4},
        "make 5 layers, but num_hidden_layers is 4",
        "complete",
    ),
    "no head": (
        lambda state: state,
        {"tie_word_embeddings": False},
        "1 missing (lm_head.weight)",
        "tie_word_embeddings",
    ),
    "biases": (without(".bias"), {}, "attention_bias and mlp_bias in config.json", "correct attention_bias"),
    "FP8 and no word of it": (in_fp8, {}, "model.layers.0.mlp.down_proj.weight is F8_E4M3", "quantised from"),
    "no scales": (as_dtype(torch.float8_e4m3fn), FP8, "model.embed_tokens.weight is F8_E4M3", "quantised from"),
    "partial blocks": (in_fp8, FP8, "is [48, 64] with [2, 2] scales", "quantised from"),
    "int8": (as_dtype(torch.int8), {}, "model.embed_tokens.weight is I8", "quantised from"),
    **{
        method: (
            lambda state: state,
            {"quantization_config": {"quant_method": method}},
            f"'{method}'",
            "quantised from",
        )
        for method in ("gptq", "awq", "modelopt", "")
    },
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_checkpoint_that_does_not_match_its_model_is_refused(case, tmp_path):
    change, config, named, remedy = TAMPERED[case]
    model = written(tmp_path / "model", change=change, config=config)
    base = tiny.architecture(model)
    with pytest.raises(InputError) as planned:
        check_contents(str(tmp_path / "model"))
    with pytest.raises(InputError) as loaded:
        load_source(str(tmp_path / "model"))
    assert str(planned.value) == str(loaded.value)
    assert named in planned.value.problem
    assert remedy in planned.value.remedy
    assert str(tmp_path / "model") in planned.value.problem
    with pytest.raises(InputError) as streamed:
        prune_checkpoint(tmp_path / "model", tmp_path / "out", base, tiny.scores(base))
    if "quantization_config" not in config:
        assert str(streamed.value) == str(loaded.value)
    assert not (tmp_path / "out").exists()


def in_two_files(folder, twice=()):
    """Split the weights into two files; the tensors in `twice` are in both, with other values in the second."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    first, second = names[:10], names[10:]
    save_file({name: state[name] for name in first}, folder / "a.safetensors", metadata={"format": "pt"})
    others = {name: state[name] for name in second} | {name: state[name] + 1 for name in twice}
    save_file(others, folder / "b.safetensors", metadata={"format": "pt"})
    index = {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(second, "b.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return names


def beside(folder, name):
    (folder / name).write_text("{}")


# the change of a valid checkpoint, the text of the error, and the remedy
SPOILT = {
    "a tensor in two files": (
        lambda folder: in_two_files(folder, [EMBEDDING]),
        f"{EMBEDDING} is both in a.safetensors and in b.safetensors",
        "into an empty folder",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors", "safetensors"),
    "adapters beside it": (
        lambda folder: beside(folder, "adapter_config.json"),
        "adapter_config.json adds adapters",
        "merge_and_unload",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_files_that_transformers_would_load_as_another_model_are_refused_in_memory_and_in_streaming(case, tmp_path):
    spoil, named, remedy = SPOILT[case]
    base = tiny.architecture(written(tmp_path / "model"))
    spoil(tmp_path / "model")
    for way in (check_contents, load_source):
        with pytest.raises(InputError) as refused:
            way(str(tmp_path / "model"))
        assert named in refused.value.problem
        assert remedy in refused.value.remedy
    with pytest.raises(InputError) as refused:
        prune_checkpoint(tmp_path / "model", tmp_path / "out", base, tiny.scores(base))
    assert named in refused.value.problem


def test_a_model_with_adapters_is_refused_and_adapters_are_never_saved_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = written(tmp_path)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="adds adapters"):
        load_model(tmp_path)


@pytest.mark.parametrize("package", ["compressed-tensors", "bitsandbytes"])
def test_the_package_that_a_quantised_checkpoint_needs_is_named(package, tmp_path):
    written(tmp_path, config={"quantization_config": {"quant_method": package}})
    with pytest.raises(InputError, match=f"{package} is not installed") as caught:
        check_contents(str(tmp_path))
    assert f"pip install {package}" in caught.value.remedy


def test_missing_experts_are_counted_in_the_error(tmp_path):
    written(tmp_path, "qwen3_moe", change=lambda s: {name: t for name, t in s.items() if ".experts.3." not in name})
    with pytest.raises(InputError, match=r"3 experts per layer, but config\.json says 4"):
        check_contents(str(tmp_path))


def test_a_head_that_differs_from_its_tied_embedding_is_refused(tmp_path):
    model = written(tmp_path / "model", change=lambda state: {**state, HEAD: state[EMBEDDING] + 1})
    base = tiny.architecture(model)
    for read in (
        lambda: load_source(str(tmp_path / "model")),
        lambda: load_model(tmp_path / "model"),
        lambda: open_model(tmp_path / "model", torch.float32),
        lambda: prune_checkpoint(tmp_path / "model", tmp_path / "out", base, tiny.scores(base)),
    ):
        with pytest.raises(InputError, match=r"config.json ties lm_head.weight to .* they differ"):
            read()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    written(tmp_path, change=lambda state: {**state, LAYER: state[LAYER] / 0})
    with pytest.raises(InputError, match=f"1 tensors contain values that are not finite .{LAYER}"):
        load_source(str(tmp_path))


PICKLED = {
    **{
        name: TAMPERED[name]
        for name in ("a tensor missing", "another shape", "DistributedDataParallel", "more layers", "int8")
    },
    "FP8 and no word of it": (in_fp8, {}, "model.layers.0.mlp.down_proj.weight is float8_e4m3fn", "quantised from"),
    "no scales": (as_dtype(torch.float8_e4m3fn), FP8, "model.embed_tokens.weight is float8_e4m3fn", "quantised from"),
    "complex numbers": (as_dtype(torch.complex64), {}, "model.embed_tokens.weight is complex64", "quantised from"),
    "inside another dict": (lambda state: {"model": state}, {}, "missing", "complete"),
}


def as_pickle(folder, change, archive=True):
    """Replace the safetensors of a checkpoint by a file of torch.save, with changed tensors."""
    state = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=archive)


@pytest.mark.parametrize(("case", "archive"), [*((case, True) for case in PICKLED), ("int8", False)])
def test_pickled_weights_that_do_not_match_the_model_are_refused_as_safetensors_are(case, archive, tmp_path):
    change, config, named, remedy = PICKLED[case]
    written(tmp_path, config=config)
    as_pickle(tmp_path, change, archive)
    error = refused_alike(str(tmp_path))
    assert named in error.problem
    assert remedy in error.remedy


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_pickled_weights_that_match_the_model_are_accepted(family, archive, tmp_path):
    model = written(tmp_path, family)
    as_pickle(tmp_path, lambda state: state, archive)
    check_contents(str(tmp_path))
    assert same(load_source(str(tmp_path))[0], model)


HARMLESS = {
    "as it was": lambda state: state,
    "the base model alone": lambda state: {name.removeprefix("model."): tensor for name, tensor in state.items()},
    "its prefix twice": prefixed("model."),
    "an equal head": lambda state: {**state, HEAD: state[EMBEDDING]},
    "the head alone": lambda state: {HEAD if name == EMBEDDING else name: tensor for name, tensor in state.items()},
    "rotary frequencies": plus("model.layers.0.self_attn.rotary_emb.inv_freq", 12),
    "a mask": plus("model.layers.0.self_attn.masked_bias", 1),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_checkpoints_that_transformers_loads_correctly_are_accepted_in_memory_and_in_streaming(case, tmp_path):
    model = written(tmp_path / "model", change=HARMLESS[case])
    check_contents(str(tmp_path / "model"))
    assert same(load_source(str(tmp_path / "model"))[0], model)
    base = tiny.architecture(model)
    prune_checkpoint(tmp_path / "model", tmp_path / "out", base, tiny.scores(base))
    assert same(load_model(tmp_path / "out"), model)


@pytest.mark.parametrize("shard", ["50GB", "60KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_valid_checkpoint_of_every_family_is_accepted(family, tied, shard, tmp_path):
    model = tiny.model(family, tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    tiny.tokenizer().save_pretrained(tmp_path)
    check_contents(str(tmp_path))
    assert same(load_source(str(tmp_path))[0], model)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral", "phi3"])
def test_an_fp8_teacher_is_dequantised_and_saved_as_an_ordinary_one(family, tmp_path):
    shape = {"head_dim": 16, "intermediate_size": 128}
    written(tmp_path / "fp8", family, change=in_fp8, config=FP8, **shape)
    stored = load_file(tmp_path / "fp8/model.safetensors")
    exact = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    for name, tensor in exact.items():
        if f"{name}_scale_inv" in stored:
            scales = stored[f"{name}_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)
            exact[name] = tensor.float() * scales[: tensor.shape[0], : tensor.shape[1]]
    check_contents(str(tmp_path / "fp8"))
    assert plain_folder(str(tmp_path / "fp8")) is None  # its tensors are not those of the model
    for dtype in (torch.float32, torch.bfloat16):
        save_model(*load_source(str(tmp_path / "fp8"), dtype=dtype), tmp_path / str(dtype))
        saved = load_file(tmp_path / str(dtype) / "model.safetensors")
        assert saved.keys() == exact.keys()
        assert all(torch.equal(tensor, exact[name].to(dtype)) for name, tensor in saved.items())
        assert "quantization_config" not in (tmp_path / str(dtype) / "config.json").read_text()


def test_plan_and_prune_refuse_invalid_checkpoints_on_the_command_line(bench, tmp_path):
    shutil.copytree(bench / "teacher", tmp_path / "teacher")
    weights = tmp_path / "teacher/model.safetensors"
    save_file(without(LAYER)(load_file(weights)), weights, metadata={"format": "pt"})
    base = tiny.architecture(tiny.model(hidden_size=48, num_attention_heads=6))
    tiny.scores(base).save(tmp_path / "scores.safetensors")
    recipe = [
        str(bench / "recipe.yaml"),
        "--storage",
        str(tmp_path / "runs"),
        "--set",
        f"teacher.model={tmp_path}/teacher",
    ]
    scores = ["--scores", str(tmp_path / "scores.safetensors"), "--num-layers", "4"]
    for arguments in (["plan", *recipe], ["prune", f"{tmp_path}/teacher", str(tmp_path / "out"), *scores]):
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 2, result.output
        assert f"1 missing ({LAYER})" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and a folder with the files of the only model on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/models--somebody--model/snapshots" / ("0" * 40)


def cached(snapshot, *names):
    """Fill the hub cache as a download of these files does."""
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs/main").write_text(snapshot.name)
    written(snapshot, change=without(LAYER))
    for file in snapshot.iterdir():
        if names and file.name not in names:
            file.unlink()


def test_a_hub_model_in_the_cache_is_checked(hub):
    cached(hub)
    for check in (check_contents, plain_folder):
        with pytest.raises(InputError, match=f"somebody/model: .* 1 missing .{LAYER}"):
            check("somebody/model")
    written(hub)
    assert plain_folder("somebody/model") == str(hub)


def test_a_hub_model_with_only_its_config_in_the_cache_is_accepted(hub):
    cached(hub, "config.json")
    with pytest.raises(InputError, match="not all in the local cache, and the hub cannot be reached") as caught:
        check_contents("somebody/model")
    assert "hf download somebody/model" in caught.value.remedy


def test_the_headers_of_a_hub_model_that_is_not_cached_are_read_from_the_hub(hub, tmp_path):
    cached(hub, "config.json")
    remote = tmp_path / "remote"
    written(remote, change=without(LAYER))
    sent = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            file = remote / self.path.rsplit("/", 1)[-1]
            if not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            data = file.read_bytes()
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                data = data[int(first) : int(last) + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                sent.append((file.name, len(data)))
                self.wfile.write(data)
            return None

        def log_message(self, *_):
            pass

    with serving(HTTPServer(("127.0.0.1", 0), Hub)) as server:
        code = "from minitron.checkpoints.headers import hub_headers; print(*hub_headers('somebody/model', None))"
        address = f"http://127.0.0.1:{server.server_port}"
        variables = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(hub.parents[2])}
        read = subprocess.run(
            [sys.executable, "-c", code], env=environment() | variables, capture_output=True, text=True, timeout=120
        )
    assert sorted(read.stdout.split()) == sorted(load_file(remote / "model.safetensors")), read.stderr
    assert {name for name, _ in sent} == {"model.safetensors"}
    assert max(size for _, size in sent) < (remote / "model.safetensors").stat().st_size / 2

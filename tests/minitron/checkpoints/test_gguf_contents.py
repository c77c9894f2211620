"""GGUF files of which transformers would leave something out are refused from their header alone; others load as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import gguf_files, tiny
from helpers.refusals import refused_alike
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minitron import storage
from minitron.checkpoints import gguf_remote
from minitron.errors import InputError
from minitron.models import check_contents, load_model, load_source, save_model

FACTORS = "rope_freqs.weight"
# of Llama 3.2, for the frequencies of a small head
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny.rows()).logits


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in gguf_files.FAMILIES for tied in (True, False) if tied or family != "gemma2"],
)
def test_a_gguf_file_of_every_family_is_the_model_that_it_was_made_of(family: str, tied: bool, tmp_path: Path) -> None:
    path, model = tmp_path / "tiny.gguf", gguf_files.model(family, tied)
    gguf_files.write(path, model)
    check_contents(str(path))
    torch.testing.assert_close(logits(load_source(str(path))[0]), logits(model))  # Gemma's attention rounds differently


def without(*ends: str):
    return lambda tensors: {name: values for name, values in tensors.items() if not name.endswith(ends)}


def plus(name: str, *shape: int, value: float = 1):
    return lambda tensors: {**tensors, name: np.full(shape, value, np.float32)}


# the change of the tensors, the change of the header, the text of the error, and the remedy
TAMPERED = {
    "a tensor missing": (without("blk.1.attn_q.weight"), {}, "1 missing (blk.1.attn_q.weight)", "again"),
    "no norm": (without("output_norm.weight"), {}, "1 missing (output_norm.weight)", "again"),
    "a tensor too many": (plus("blk.0.adapter.weight", 2, 2), {}, "(blk.0.adapter.weight)", "as safetensors"),
    "a bias that is not read": (plus("blk.0.attn_output.bias", 64), {}, "leave out these biases", "as safetensors"),
    "scales of a quantisation": (plus("blk.0.attn_q.scale", 1), {}, "(blk.0.attn_q.scale)", "as safetensors"),
    "factors of longrope": (plus("rope_factors_long.weight", 8), {}, "(rope_factors_long.weight)", "as safetensors"),
    "another shape": (plus("output_norm.weight", 3), {}, "output_norm.weight is [3], not [64]", "as safetensors"),
    "more layers": (dict, {"block_count": 1}, "make 2 layers, but the header's block_count is 1", "again"),
    "fewer layers": (dict, {"block_count": 3}, "make 2 layers, but the header's block_count is 3", "again"),
    "unknown factors of RoPE": (plus(FACTORS, 7, value=2), {}, "factors in rope_freqs.weight", "as safetensors"),
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("case", TAMPERED)
def test_a_gguf_file_that_transformers_would_read_as_another_model_is_refused_by_its_header(
    case: str, family: str, tmp_path: Path
) -> None:
    change, values, named, remedy = TAMPERED[case]
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path, gguf_files.model(family), change, values)
    error = refused_alike(str(path))
    assert named in error.problem
    assert str(path) in error.problem
    assert remedy in error.remedy


HARMLESS = {
    "rotary frequencies": (plus("blk.0.attn_rot_embd.weight", 8), {}),
    "factors that scale nothing": (plus(FACTORS, 8), {}),
    "no scaling": (dict, {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}),
    "a linear scaling by one": (dict, {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_not_change_the_model_is_accepted(case: str, tmp_path: Path) -> None:
    change, values = HARMLESS[case]
    path, model = tmp_path / "tiny.gguf", gguf_files.model("llama")
    gguf_files.write(path, model, change, values)
    check_contents(str(path))
    assert torch.equal(logits(load_source(str(path))[0]), logits(model))


def llama3(**changes: Any) -> tuple[torch.nn.Module, np.ndarray]:
    """A Llama 3 model, and the factors that llama.cpp writes for it."""
    model = gguf_files.model("llama", head_dim=64, rope_parameters=LLAMA3 | changes)
    plain = gguf_files.model("llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    scaled, unscaled = (LlamaRotaryEmbedding(made.config).inv_freq for made in (model, plain))
    return model, (unscaled / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_rope_of_llama_3_is_read_from_a_gguf_file_and_kept(factor: float, tmp_path: Path) -> None:
    model, factors = llama3(factor=factor)
    path = tmp_path / "tiny.gguf"
    gguf_files.write(
        path, model, lambda tensors: {**tensors, FACTORS: factors}, {"rope.freq_base": LLAMA3["rope_theta"]}
    )
    check_contents(str(path))
    loaded, tokenizer = load_source(str(path))
    assert loaded.config.rope_parameters == LLAMA3 | {"factor": factor}
    save_model(loaded, tokenizer, tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(model))
    plain = gguf_files.model("llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    assert not torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("changes", [{"high_freq_factor": 3.0}, {"original_max_position_embeddings": 4096}])
def test_factors_of_rope_that_are_not_those_of_llama_3_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    model, factors = llama3(**changes)
    path = tmp_path / "tiny.gguf"
    values = {"rope.freq_base": LLAMA3["rope_theta"]}
    gguf_files.write(path, model, lambda tensors: {**tensors, FACTORS: factors}, values)
    with pytest.raises(InputError, match="not those of a Llama 3 model with 8,192 tokens before the scaling"):
        check_contents(str(path))


def test_an_uploaded_gguf_file_is_checked_by_its_header_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_remote, "FIRST_BYTES", 64)
    model, factors = llama3()
    values = {"rope.freq_base": LLAMA3["rope_theta"]}
    for name, change in (
        ("whole", lambda tensors: {**tensors, FACTORS: factors}),
        ("surplus", plus("blk.0.adapter.weight", 2)),
    ):
        gguf_files.write(tmp_path / f"{name}.gguf", model, change, values)
    folder = storage.upload_files(
        {f"{name}.gguf": tmp_path / f"{name}.gguf" for name in ("whole", "surplus")}, "memory://uploads"
    )
    check_contents(f"{folder}/whole.gguf")
    with pytest.raises(InputError, match=r"blk\.0\.adapter\.weight"):
        check_contents(f"{folder}/surplus.gguf")
    assert not list(tmp_path.glob("cache/**/*.gguf"))
    assert torch.equal(logits(load_source(f"{folder}/whole.gguf")[0]), logits(model))

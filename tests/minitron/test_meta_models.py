"""Models whose weights are read after they are built, and written a tensor at a time."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.live_bytes import LiveBytes

from minitron.checkpoints.identity import model_identity
from minitron.distill import loading
from minitron.distill.loading import load_source_together
from minitron.errors import InputError
from minitron.logits import Head
from minitron.meta_models import load_onto, open_model, read_, read_head, write_model
from minitron.models import final_hidden, load_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_read_one_tensor_at_a_time_computes_what_transformers_loads_and_is_saved_as_it_was(family, tmp_path):
    given = tiny.model(family, tied=family.startswith("gemma"))
    given.generation_config.eos_token_id = [3, 5]
    given.save_pretrained(tmp_path / "given")
    tokens = tiny.rows(2)
    for dtype in (torch.float32, torch.bfloat16):
        expected = load_model(tmp_path / "given", dtype)
        model, weights = open_model(tmp_path / "given", dtype)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
        read_(model, weights, dtype, CPU)
        # by which an evaluation finds the answers that it has stored
        assert model_identity(model, tiny.tokenizer()) == model_identity(expected, tiny.tokenizer())
        assert model.config._attn_implementation == expected.config._attn_implementation
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
        with torch.inference_mode():
            assert torch.equal(final_hidden(model, tokens), final_hidden(expected, tokens))
            assert torch.equal(model(tokens).logits, expected(tokens).logits)
        head, whole = read_head(tmp_path / "given", dtype), Head.of(expected)
        assert torch.equal(head.weight, whole.weight)
        assert (head.softcap, head.scale) == (whole.softcap, whole.scale)
    written = tmp_path / "written"
    written.mkdir()
    write_model(model, weights, torch.bfloat16, written)
    again = load_model(written, torch.bfloat16)
    assert again.config.dtype == torch.bfloat16
    assert again.generation_config.to_dict() == expected.generation_config.to_dict()
    for name, parameter in expected.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_a_gpu_gets_a_model_without_a_copy_of_it_in_main_memory(family, tmp_path, monkeypatch):
    """As a stage loads a folder, and as `minitron evaluate` loads a source."""
    monkeypatch.setattr(loading, "device", lambda: torch.device("meta"))
    tiny.model(family, num_hidden_layers=8).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    for load in (
        lambda: load_onto(tmp_path, torch.bfloat16, torch.device("meta")),
        lambda: load_source_together(str(tmp_path), torch.bfloat16, together=True)[0],
    ):
        with LiveBytes().counting() as live:
            on_gpu = load()
        sizes = [parameter.nbytes for parameter in on_gpu.parameters()]
        assert live.peak < 2.1 * max(sizes) < sum(sizes) / 2
        assert all(buffer.is_meta for buffer in on_gpu.buffers())
        assert not on_gpu.training


def test_a_source_whose_weights_are_not_finite_is_refused_on_its_way_to_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "device", lambda: torch.device("meta"))
    broken = tiny.model()
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    broken.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path}: 1 tensors contain values that are not finite .model.norm"):
        load_source_together(str(tmp_path), torch.float32, together=True)

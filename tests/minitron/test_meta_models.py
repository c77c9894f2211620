"""Models whose weights are read after they are built, and written a tensor at a time."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.live_bytes import LiveBytes

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
def test_a_gpu_gets_a_model_without_a_copy_of_it_in_main_memory(family, tmp_path):
    tiny.model(family, num_hidden_layers=8).to(torch.bfloat16).save_pretrained(tmp_path)
    with LiveBytes().counting() as live:
        on_gpu = load_onto(tmp_path, torch.bfloat16, torch.device("meta"))
    sizes = [parameter.nbytes for parameter in on_gpu.parameters()]
    assert live.peak < 2.1 * max(sizes) < sum(sizes) / 2
    assert all(buffer.is_meta for buffer in on_gpu.buffers())

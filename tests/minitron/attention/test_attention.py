"""Attention in packed rows: equality with separate documents, memory, host synchronisation and compiled graphs."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.documents import DOCUMENTS, one_by_one, packed
from helpers.largest_storage import LargestStorage
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask

from minitron.attention import interface, row_arguments, use_own_attention
from minitron.attention import rows as row_attention
from minitron.attention.masks import block_mask, dense_mask, visible
from minitron.distill.blocks import running_blocks
from minitron.errors import InputError
from minitron.models import final_hidden, load_model

WINDOW = {name: {"sliding_window": 5} for name in ("mistral", "phi3", "mixtral", "qwen3_moe")}
REFERENCE = {"gemma2": {"attn_implementation": "eager"}}  # transformers 5.17 takes sdpa, which leaves the soft-cap out
WINDOW["qwen2"] = WINDOW["qwen3"] = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """Use the unfused form of flex_attention, which supports gradients on CPUs and the meta device."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


@pytest.fixture
def use_kernel(flex_on_cpu, monkeypatch):
    """A function that compiles flex_attention with a backend of torch.compile, as on CUDA, until the end of the test."""

    def use(backend):
        compile_ = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda function, **options: compile_(function, backend=backend, **options)
        )
        monkeypatch.setattr(row_attention, "chosen_kernel", lambda device: "flex")
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        interface._compiled.cache_clear()
        torch._dynamo.reset()

    yield use
    interface._compiled.cache_clear()


def model_of(family, **changes):
    return tiny.model(family, **{"num_hidden_layers": 2, **WINDOW.get(family, {}), **changes})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_documents_in_a_row_give_the_same_as_in_separate_passes(family, flex_on_cpu):
    rows, weights = packed(), torch.randn(64, dtype=torch.float64)
    model = model_of(family, attn_implementation="eager").double()
    parameters = list(model.get_decoder().parameters())

    def gradients(states):
        return torch.autograd.grad((states * weights).sum(), parameters)

    expected = one_by_one(model, rows)
    exact = gradients(expected)
    model = model_of(family).double()  # with the implementation that transformers chooses
    parameters = list(model.get_decoder().parameters())
    for kernel in ("dense", "flex"):
        arguments = row_arguments(model, rows, DOCUMENTS, kernel)
        assert torch.equal(arguments["position_ids"], DOCUMENTS.positions(rows))
        states = model.get_decoder()(rows, use_cache=False, **arguments).last_hidden_state
        tolerance = {"rtol": 1e-5, "atol": 1e-5}  # norms and, in eager attention, softmax are float32
        assert torch.allclose(states, expected, **tolerance), kernel
        for got, wanted in zip(gradients(states), exact, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), kernel


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_documents_a_cpu_computes_the_same_bits_as_transformers(family):
    model, rows = model_of(family, **REFERENCE.get(family, {})), tiny.rows(2, 24)
    for part in (rows, rows[:, :4]):  # longer and shorter than the window
        own = model_of(family)
        assert torch.equal(final_hidden(own, part), model.get_decoder()(part).last_hidden_state)
    assert model.config.to_dict() == own.config.to_dict()


def test_keys_of_another_model_in_a_config_change_the_attention_as_little_as_in_transformers(flex_on_cpu):
    """A checkpoint that was converted from Mistral or Qwen to Llama's names often keeps them."""
    stray = {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "chunked_attention"],
        "use_bidirectional_attention": True,
    }
    plain, model, rows = model_of("llama").double(), model_of("llama").double(), tiny.rows(2, 24)
    for name, value in stray.items():
        setattr(model.config, name, value)  # as from_pretrained does with what config.json has
    expected = plain.get_decoder()(rows).last_hidden_state
    assert torch.equal(model.get_decoder()(rows, use_cache=False).last_hidden_state, expected)
    assert torch.equal(final_hidden(model, rows), expected)
    rows = packed()
    for kernel in ("dense", "flex"):
        apart = [
            each.get_decoder()(rows, use_cache=False, **row_arguments(each, rows, DOCUMENTS, kernel))[0]
            for each in (model, plain)
        ]
        assert torch.equal(*apart)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral"])
def test_sliding_windows_and_soft_caps_in_flex_attention_equal_those_of_transformers(family, flex_on_cpu):
    model, rows = model_of(family, **REFERENCE.get(family, {})).double(), tiny.rows(2, 24)
    expected = model.get_decoder()(rows).last_hidden_state
    states = model.get_decoder()(rows, use_cache=False, **row_arguments(model, rows, kernel="flex")).last_hidden_state
    assert torch.allclose(states, expected, rtol=1e-5, atol=1e-5)


def test_a_loaded_model_soft_caps_whoever_runs_it(tmp_path):
    model, ids = model_of("gemma2", **REFERENCE["gemma2"]), tiny.rows(2, 12)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_own_attention_gives_the_same_results_with_padding_and_in_generation(family):
    model, ids = model_of(family, **REFERENCE.get(family, {})), tiny.rows(2, 12)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    before = model(ids, attention_mask=padding).logits
    text = model.generate(ids, attention_mask=padding, max_new_tokens=4, do_sample=False)
    use_own_attention(model.config)
    assert torch.equal(model(ids, attention_mask=padding).logits, before)
    assert torch.equal(model.generate(ids, attention_mask=padding, max_new_tokens=4, do_sample=False), text)


@pytest.mark.parametrize("seq_length", [100, 256, 700])
@pytest.mark.parametrize("window", [None, 1, 128, 300])
@pytest.mark.parametrize("documents", [False, True])
def test_block_masks_equal_those_from_every_pair_of_positions(seq_length, window, documents):
    numbers = None
    if documents:
        rows = torch.randint(9, 20, (3, seq_length), generator=torch.Generator().manual_seed(seq_length))
        rows[0, [3, 60]] = rows[1, ::150] = DOCUMENTS.end
        numbers = DOCUMENTS.numbers(rows)
    device, sees = torch.device("cpu"), visible(window, numbers)
    actual = block_mask(seq_length, window, numbers, device)
    count = 1 if numbers is None else len(numbers)
    expected = create_block_mask(sees, count, None, seq_length, seq_length, device)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks", "kv_indices"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    dense = flex.create_mask(sees, count, None, seq_length, seq_length, device)
    assert torch.equal(dense_mask(seq_length, window, numbers, device), dense)


class _Fused(torch.autograd.Function):
    """A stand-in for the compiled kernel on the meta device, which saves its inputs and outputs."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value, query.new_empty(query.shape))
        return query.new_empty(query.shape)

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral", "phi3", "llama"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_on_cuda_no_tensor_has_all_pairs_of_positions_and_the_host_does_not_synchronise(family, documents, monkeypatch):
    masks = []

    def fused(query, key, value, block_mask=None, attn_mask=None, **options):
        assert attn_mask is None
        masks.append(block_mask)
        return _Fused.apply(query, key, value)

    monkeypatch.setattr(interface, "_compiled", lambda: fused)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(row_attention, "chosen_kernel", lambda device: "flex")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    with torch.device("meta"):
        model = tiny.from_config(tiny.config(family, True, **WINDOW.get(family, {}), num_hidden_layers=2))
        rows = torch.empty(2, 8192, dtype=torch.int64)
    # on the meta device it is an error if the host reads a value
    with LargestStorage() as largest, running_blocks(model, activation_checkpointing="full", compiled=False):
        final_hidden(model, rows, documents).sum().backward()
    assert largest.bytes < 8192**2 / 2, largest.made_by
    plain = {"llama": 2, "gemma3_text": 1}.get(family, 0) if not documents else 0
    # in each of two layers, and once more for the backward pass
    assert [mask is None for mask in masks].count(True) == 2 * plain
    assert len(masks) == 4


def test_compiled_layers_have_one_graph_per_window_size_for_all_documents(flex_on_cpu, monkeypatch):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, backend=counting, fullgraph=True, **options)
    )
    torch._dynamo.reset()
    model = model_of("gemma3_text", num_hidden_layers=4)
    with running_blocks(model, activation_checkpointing="none", compiled=True):
        for seed in range(3):
            rows = packed(seed=seed)
            arguments = row_arguments(model, rows, DOCUMENTS, "flex")
            model.get_decoder()(rows, use_cache=False, **arguments).last_hidden_state.sum().backward()
    assert len(graphs) == 2  # of layers with a window and without


@pytest.mark.parametrize(("family", "masks"), [("gemma2", 2), ("llama", 1)])
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_has_the_same_gradients_if_activations_are_recomputed(family, masks, compiled, use_kernel):
    """With documents, windows and soft-caps, compiled as on CUDA, alone or with the whole layer, but not fused."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    model, rows, other = model_of(family), packed(), packed(seed=2)
    weights, parameters = torch.randn(64), list(model.get_decoder().parameters())

    def gradients(recompute, compiled):
        with running_blocks(model, activation_checkpointing=recompute, compiled=compiled):
            states = final_hidden(model, rows, DOCUMENTS)
            with torch.no_grad():
                final_hidden(model, other, DOCUMENTS)  # whose masks are not those of the backward pass
            return torch.autograd.grad((states * weights).sum(), parameters)

    expected = gradients("none", compiled=False)  # with dense masks
    use_kernel(counting)
    found = {how: gradients(how, compiled) for how in ("selective", "full", "none")}
    # for each mask, one with gradients and one without; of whole layers, which run as they are without gradients, one a setting
    assert len(graphs) == masks * (4 if compiled else 2)
    for how, own in found.items():
        assert all(map(torch.equal, own, found["none"])), how
        for got, wanted in zip(own, expected, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), how


def test_kernels_of_further_shapes_replace_those_that_are_too_many(use_kernel, monkeypatch, caplog):
    made = []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(interface, "KERNELS", 2)
    rows = packed()
    models = {heads: model_of("llama", num_attention_heads=heads, num_key_value_heads=1) for heads in (1, 2, 4)}
    expected = {heads: final_hidden(model, rows, DOCUMENTS) for heads, model in models.items()}
    use_kernel(counting)
    with torch.no_grad():
        for heads in (1, 2, 4, 2, 4):
            assert torch.allclose(final_hidden(models[heads], rows, DOCUMENTS), expected[heads], atol=1e-5)
    # the third drops the first two
    assert len(made) == 4
    assert caplog.text.count("compiled anew") == 1


def test_the_kernel_serves_held_out_rows_in_inference_mode_between_the_steps_of_a_training(use_kernel):
    model, rows = model_of("llama").double(), packed()
    parameters = list(model.get_decoder().parameters())
    expected = final_hidden(model, rows, DOCUMENTS)
    exact = torch.autograd.grad(expected.sum(), parameters)
    use_kernel(aot_eager)
    for measured in (True, False, True, False):
        with torch.inference_mode(measured):
            states = final_hidden(model, rows, DOCUMENTS)
            assert torch.allclose(states, expected, rtol=1e-5, atol=1e-5)
        if not measured:
            for got, wanted in zip(torch.autograd.grad(states.sum(), parameters), exact, strict=True):
                assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_an_explicit_attention_implementation_is_kept_and_cannot_separate_documents():
    model, rows = model_of("llama", attn_implementation="flex_attention"), packed()
    assert row_arguments(model, rows) == {}
    assert model.config._attn_implementation == "flex_attention"
    with pytest.raises(InputError, match="llama with attention implementation 'flex_attention' cannot keep documents"):
        final_hidden(model, rows, DOCUMENTS)


def test_layers_that_see_what_follows_get_the_masks_of_transformers():
    model, rows = model_of("gemma3_text", use_bidirectional_attention=True), packed()
    assert torch.equal(final_hidden(model, rows), model.get_decoder()(rows).last_hidden_state)
    assert not torch.equal(final_hidden(model, rows), final_hidden(model_of("gemma3_text"), rows))
    with pytest.raises(
        InputError, match="gemma3_text with attention implementation 'sdpa' cannot keep documents apart"
    ):
        final_hidden(model, rows, DOCUMENTS)

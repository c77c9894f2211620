"""Every loss and its gradient equal a plain float64 reference with autograd."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from helpers import tiny
from helpers.largest_storage import LargestStorage
from helpers.loss_reference import divergence, reference
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from minitron import linear_kl_div
from minitron.distill import LiveTeacher, Losses, default_losses, linear_logit_loss
from minitron.distill.losses import mapped_layers
from minitron.distill.losses.intermediate import IntermediateLosses, dynamic_alpha, recorded
from minitron.distill.losses.objective import Objective
from minitron.distill.losses.relations import relation_loss
from minitron.errors import InputError
from minitron.logits import CHUNK_BYTES, Head, most_tokens
from minitron.models import final_hidden


def _equal_the_reference(losses, tokens=40, softcap=0.0, scale=1.0):
    torch.manual_seed(0)
    hs, ws = torch.randn(tokens, 24, requires_grad=True), torch.randn(300, 24, requires_grad=True)
    student = Head(ws, softcap=softcap, scale=scale)
    ht, teacher = torch.randn(tokens, 40), Head(torch.randn(300, 40) * 0.3, softcap=softcap, scale=scale)
    labels = torch.randint(0, 300, (tokens,))
    labels[::3] = -100
    actual = linear_logit_loss(hs, student, losses, teacher_hidden=ht, teacher_head=teacher, labels=labels)
    expected, each = reference(hs, student, ht, teacher, losses, labels)
    assert actual.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(actual.divergence, each.float(), rtol=1e-4, atol=1e-6)
    grads = torch.autograd.grad(3 * actual.loss, [hs, ws])
    wanted = torch.autograd.grad(3 * expected, [hs, ws])
    for got, exact in zip(grads, wanted, strict=True):
        assert ((got - exact).norm() / exact.norm()).item() < 1e-5
    return actual


LOGITS = ("forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("logits", LOGITS)
def test_divergences_equal_float64(logits, temperature):
    _equal_the_reference(Losses(logits=logits, temperature=temperature))


@pytest.mark.parametrize("tokens", [7, 512, 700], ids=["part of a chunk", "one chunk", "chunks and a rest"])
def test_any_number_of_tokens_equals_float64(tokens):
    _equal_the_reference(Losses(cross_entropy=0.5), tokens=tokens)


@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 0.25), (5.0, 1.0), (5.0, 0.5)])
@pytest.mark.parametrize("logits", ["forward_kl", "cosine"])
def test_soft_capped_and_scaled_logits_equal_float64(logits, softcap, scale):
    _equal_the_reference(Losses(logits=logits, temperature=2.0, cross_entropy=0.3), softcap=softcap, scale=scale)


@pytest.mark.parametrize("k", [1, 5, 300])
def test_forward_kl_to_the_top_k_tokens_equals_float64(k):
    _equal_the_reference(Losses(top_k=k, temperature=1.5))


def test_cross_entropy_counts_only_tokens_with_a_label():
    both = _equal_the_reference(Losses(logits="reverse_kl", cross_entropy=0.7, temperature=2.0))
    assert both.loss.item() == pytest.approx(both.divergence.mean().item() + 0.7 * both.cross_entropy.item(), rel=1e-5)
    alone = _equal_the_reference(Losses(logits="none", cross_entropy=1.0))
    assert alone.cross_entropy.item() == pytest.approx(both.cross_entropy.item(), rel=1e-6)
    assert not alone.divergence.any()


def test_bf16_gradient_stays_exact_when_the_student_is_close():
    # Implementations that round the logits to bfloat16 before they subtract probabilities get this gradient wrong.
    torch.manual_seed(0)
    ht, wt = torch.randn(300, 64).bfloat16(), torch.randn(9000, 64).bfloat16() * 0.5
    hs = (ht.float() + 0.02 * torch.randn(300, 64)).bfloat16().requires_grad_(True)
    ws = wt.clone().requires_grad_(True)
    loss = linear_kl_div(hs, ws, ht, wt)
    grads = torch.autograd.grad(loss, [hs, ws])
    d_hs, d_ws = hs.detach().double().requires_grad_(True), ws.detach().double().requires_grad_(True)
    expected, _ = reference(d_hs, Head(d_ws), ht, Head(wt), Losses())
    wanted = torch.autograd.grad(expected, [d_hs, d_ws])
    rounded_student = functional.log_softmax(hs.detach() @ ws.detach().T, -1).float().exp()
    rounded_teacher = functional.log_softmax(ht @ wt.T, -1).float().exp()
    usual = ((rounded_student - rounded_teacher) / 300) @ ws.detach().float()
    error = ((grads[0].double() - wanted[0]).norm() / wanted[0].norm()).item()
    usual_error = ((usual.double() - wanted[0]).norm() / wanted[0].norm()).item()
    assert error < 0.01
    assert ((grads[1].double() - wanted[1]).norm() / wanted[1].norm()).item() < 0.01
    assert usual_error > 8 * error


def test_bf16_gradient_is_multiplied_by_a_micro_batchs_share_that_is_not_rounded():
    torch.manual_seed(0)
    ht, wt = torch.randn(256, 64).bfloat16(), (0.1 * torch.randn(4000, 64)).bfloat16()
    hs, ws = torch.randn(256, 48).bfloat16().requires_grad_(), (0.1 * torch.randn(4000, 48)).bfloat16().requires_grad_()
    d_hs, d_ws = (tensor.detach().double().requires_grad_() for tensor in (hs, ws))
    share = 1 / 1152  # bfloat16 rounds it by 0.17 %
    exact = torch.autograd.grad(share * reference(d_hs, Head(d_ws), ht, Head(wt), Losses())[0], [d_hs, d_ws])
    found = torch.autograd.grad(share * linear_kl_div(hs, ws, ht, wt), [hs, ws])
    for gradient, wanted in zip(found, exact, strict=True):
        scale = (gradient.double() * wanted).sum() / wanted.square().sum()
        assert scale.item() == pytest.approx(1, abs=5e-4)
        assert ((gradient.double() - wanted).norm() / wanted.norm()).item() < 0.003


def test_large_vocabularies_are_processed_in_smaller_chunks_with_the_same_result(monkeypatch):
    assert most_tokens(49_152, "cpu", 512) == 512
    assert 4 * 262_144 * most_tokens(262_144, "cpu", 512) == 128 << 20
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(100, 8, generator=draw), torch.randn(300, 8, generator=draw)
    found = []
    for size in (128 << 20, 4 * 300 * 16):
        monkeypatch.setitem(CHUNK_BYTES, "cpu", size)
        student = hidden.clone().requires_grad_()
        loss = linear_kl_div(student, head, hidden.flip(0), head)
        loss.backward()
        found.append((float(loss), student.grad, [len(part) for part in Head(head).chunks(hidden)]))
    (whole, gradient, _), (loss, other, chunks) = found
    assert chunks == [16] * 6 + [4]
    assert loss == pytest.approx(whole, rel=1e-6)
    assert torch.allclose(other, gradient, atol=1e-7)


def test_a_second_backward_is_refused():
    hs, ht, wt = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8), torch.randn(20, 8)
    loss = linear_kl_div(hs, wt, ht, wt)
    (twice,) = torch.autograd.grad(2 * loss, hs, retain_graph=True)
    assert torch.equal(twice, 2 * torch.autograd.grad(linear_kl_div(hs, wt, ht, wt), hs)[0])
    with pytest.raises(RuntimeError, match="backward was called twice"):
        torch.autograd.grad(loss, hs)


@pytest.mark.parametrize("logits", LOGITS)
def test_a_close_student_still_gets_an_exact_loss_and_gradient(logits):
    torch.manual_seed(0)
    ht, wt = torch.randn(50, 24), torch.randn(300, 24) * 0.3
    hs = (ht + 1e-3 * torch.randn(50, 24)).requires_grad_(True)
    actual = linear_logit_loss(hs, Head(wt), Losses(logits=logits), teacher_hidden=ht, teacher_head=Head(wt))
    expected, _ = reference(hs, Head(wt), ht, Head(wt), Losses(logits=logits))
    grad, wanted = torch.autograd.grad(actual.loss, hs)[0], torch.autograd.grad(expected, hs)[0]
    assert ((grad - wanted).norm() / wanted.norm()).item() < 1e-2
    if logits in ("mse", "cosine"):  # the others are differences of logarithms that are smaller than rounding errors
        assert actual.loss.item() == pytest.approx(expected.item(), rel=1e-2)


def test_a_tied_head_gets_the_gradient_of_the_embedding_and_the_head():
    model, tokens = tiny.model(), tiny.rows(2)
    teacher = tiny.model(seed=5)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        target = final_hidden(teacher, tokens).flatten(0, 1)
    loss = linear_kl_div(final_hidden(model, tokens).flatten(0, 1), head, target, teacher.lm_head.weight.detach())
    (actual,) = torch.autograd.grad(loss, [head])
    logits = model(tokens).logits.flatten(0, 1)
    dense = functional.kl_div(
        functional.log_softmax(logits, -1),
        functional.log_softmax(teacher(tokens).logits.detach().flatten(0, 1), -1),
        log_target=True,
        reduction="batchmean",
    )
    (expected,) = torch.autograd.grad(dense, [head])
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-6)


# --- heads ---


def _causal_lm(family, **changes):
    values = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**values, **heads, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
        ("llama", {"logit_scale": 0.3, "logits_scaling": 4.0, "final_logit_softcapping": 3.0}),  # which it ignores
        ("gemma2", {"final_logit_softcapping": None, "logit_scale": 0.3}),
    ],
)
def test_a_head_gives_the_logits_of_its_model(family, changes):
    model, tokens = _causal_lm(family, **changes), tiny.rows(2)
    with torch.no_grad():
        logits = Head.of(model).logits(final_hidden(model, tokens).flatten(0, 1))
        assert torch.allclose(logits, model(tokens).logits.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(InputError, match=r"PhiForCausalLM: its logits .*the head also has bias"):
        Head.of(_causal_lm("phi"))


def test_invalid_arguments_of_the_logit_loss_are_refused():
    hidden, head = torch.randn(4, 8), Head(torch.randn(30, 8))
    teacher = {"teacher_hidden": hidden, "teacher_head": head}
    with pytest.raises(InputError, match="forward_kl without a teacher"):
        linear_logit_loss(hidden, head, Losses())
    with pytest.raises(InputError, match="vocabulary has 20 tokens, the student's 30"):
        linear_logit_loss(hidden, head, Losses(), teacher_hidden=hidden, teacher_head=Head(torch.randn(20, 8)))
    with pytest.raises(InputError, match="top_k: 31 is more than the vocabulary of 30 tokens"):
        linear_logit_loss(hidden, head, Losses(top_k=31), **teacher)
    with pytest.raises(InputError, match=r"cross_entropy: 0.5 without labels"):
        linear_logit_loss(hidden, head, Losses(cross_entropy=0.5), **teacher)


# --- intermediate losses ---

OWN = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ALL = Losses(hidden=("last-2:last-2", "4:2"), embedding=True, mlp_input=("1:1",), attention=("3:last",))


def _pair(**changes):
    return tiny.model(seed=1, **OWN), tiny.model(seed=2, **changes)


def _everything(model, tokens):
    """The outputs of all modules, by name."""
    with recorded(model, [name for name, _ in model.named_modules() if name]) as outputs:
        final_hidden(model, tokens)
    return outputs


@pytest.mark.parametrize("how", ["cosine", "mse"])
def test_intermediate_losses_equal_float64(how):
    student, teacher = _pair()
    tokens = tiny.rows(3)
    torch.manual_seed(3)
    channels = torch.randperm(64)[:48].sort().values
    module = IntermediateLosses(student, teacher, replace(ALL, hidden_loss=how), channels)
    with torch.no_grad():
        module.projection.add_(0.1 * torch.randn_like(module.projection))
    own, other = _everything(student, tokens), _everything(teacher, tokens)
    loss = (module(own, other) * torch.tensor([1.0, 2.0, 3.0])).sum()

    projection = module.projection.detach().double().requires_grad_(True)

    def distance(mine, theirs):
        x, y = own[mine].double() @ projection.T, other[theirs].double().detach()
        each = (x - y).square().mean(-1) if how == "mse" else 1 - functional.cosine_similarity(x, y, dim=-1)
        return each.mean(-1)

    def relation(mine, theirs, heads):
        def log_relation(values):
            parts = values.double().unflatten(-1, (heads, -1))
            scores = torch.einsum("bihd,bjhd->bhij", parts, parts) / parts.shape[-1] ** 0.5
            return scores.log_softmax(-1)

        mine, theirs = log_relation(own[mine]), log_relation(other[theirs].detach())
        return (theirs.exp() * (theirs - mine)).sum(-1).mean((1, 2))

    expected = distance("model.embed_tokens", "model.embed_tokens")
    expected = expected + distance("model.layers.1.input_layernorm", "model.layers.3.input_layernorm")
    expected = expected + distance("model.norm", "model.norm")
    expected = expected + distance("model.layers.1.post_attention_layernorm", "model.layers.1.post_attention_layernorm")
    for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
        expected = expected + relation(f"model.layers.2.self_attn.{name}", f"model.layers.3.self_attn.{name}", heads)
    expected = (expected * torch.tensor([1.0, 2.0, 3.0])).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    named = [
        student.model.embed_tokens.weight,
        student.model.layers[1].mlp.up_proj.weight,
        student.model.layers[2].self_attn.k_proj.weight,
    ]
    grads = torch.autograd.grad(loss, [module.projection, *named], retain_graph=True)
    wanted = torch.autograd.grad(expected, [projection, *named])
    for got, exact in zip(grads, wanted, strict=True):
        assert torch.allclose(got, exact.float(), rtol=1e-3, atol=1e-5 * exact.abs().max())


def test_the_projection_starts_as_the_selection_of_the_kept_channels():
    student, teacher = _pair()
    losses = Losses(embedding=True)
    tokens, channels = tiny.rows(2), torch.arange(0, 48) + 7
    with torch.no_grad():  # as pruning does
        student.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight[:, channels])
    hidden = student.model.embed_tokens(tokens)
    scattered = functional.linear(hidden, IntermediateLosses(student, teacher, losses, channels).projection)
    assert torch.equal(scattered[..., channels], hidden)
    assert scattered.count_nonzero() == hidden.count_nonzero()
    same = IntermediateLosses(teacher, tiny.model(seed=4), losses).projection
    assert torch.equal(same, torch.eye(64))
    # if channels are not given, they are derived from the embeddings
    fitted = IntermediateLosses(student, teacher, losses).projection
    assert torch.allclose(fitted[channels], torch.eye(48), atol=1e-3)
    for wrong in (channels[:5], channels + 64):
        with pytest.raises(InputError, match=r"channels: \["):
            IntermediateLosses(student, teacher, losses, wrong)


def test_the_attention_loss_alone_has_no_projection():
    module = IntermediateLosses(*_pair(), Losses(attention=("1:1",)))
    assert not list(module.parameters())


def test_relations_of_a_fused_qkv_projection_are_those_of_its_parts():
    fused = {"family": "phi3", "tied": False, "attention_bias": False}
    student, teacher = tiny.model(seed=1, **fused, **OWN, head_dim=12), tiny.model(seed=2, **fused, head_dim=8)
    tokens = tiny.rows(2)
    own, other = _everything(student, tokens), _everything(teacher, tokens)
    actual = IntermediateLosses(student, teacher, Losses(attention=("1:0",)))(own, other)
    mine = own["model.layers.0.self_attn.qkv_proj"].split([4 * 12, 2 * 12, 2 * 12], -1)
    theirs = other["model.layers.1.self_attn.qkv_proj"].split([8 * 8, 2 * 8, 2 * 8], -1)
    expected = sum(relation_loss(*pair) for pair in zip(mine, theirs, (4, 2, 2), strict=True))
    assert torch.allclose(actual, expected)


@pytest.mark.parametrize("block_relations", [1, 30, 100, 700])  # of 3 rows, 2 heads and 11 positions: 726
def test_relations_in_blocks_equal_float64(block_relations):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 11, 8, requires_grad=True), torch.randn(3, 11, 12)
    weights = torch.tensor([1.0, 2.0, 3.0])
    loss = relation_loss(student, teacher, 2, block_relations)

    def log_relations(values):
        parts = values.double().unflatten(-1, (2, -1))
        return (torch.einsum("bihd,bjhd->bhij", parts, parts) / parts.shape[-1] ** 0.5).log_softmax(-1)

    mine, theirs = log_relations(student), log_relations(teacher)
    exact = (theirs.exp() * (theirs - mine)).sum(-1).mean((1, 2))
    assert torch.allclose(loss.double(), exact, rtol=1e-5)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), student)
    (wanted,) = torch.autograd.grad((exact * weights).sum(), student)
    assert torch.allclose(gradient, wanted, atol=1e-5 * wanted.abs().max())


def test_relations_of_long_rows_never_exist_as_a_whole():
    student = torch.empty(2, 8192, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with LargestStorage() as largest:
        relation_loss(student, torch.empty_like(student), 32).sum().backward()
    whole = 4 * 2 * 32 * 8192**2
    assert largest.bytes == 4 * student.numel() == whole / 64, largest.made_by


def test_dynamic_alpha_balances_each_row_and_ignores_rounding_errors():
    intermediate = torch.tensor([0.5, 2.0, 1e-8, -1e-8], requires_grad=True)
    alpha = dynamic_alpha(torch.tensor([1.0, 1.0, 1.0, 1.0]), intermediate)
    assert alpha.tolist() == [2.0, 0.5, 0.0, 0.0]
    assert not alpha.requires_grad


@pytest.mark.parametrize("alpha", [None, 0.7])
def test_the_objective_is_the_sum_of_its_parts_and_leaves_no_hooks(alpha):
    student, teacher = _pair()
    tokens = tiny.rows(3)
    losses = replace(ALL, alpha=alpha, cross_entropy=0.25)
    objective = Objective(student, LiveTeacher(teacher), losses)
    assert [name for name, _ in objective.named_parameters()][-1] == "intermediate.projection"
    loss, (total, kl, cross_entropy, intermediate) = objective([0, 1, 2], tokens)
    logits, target = student(tokens).logits.double(), teacher(tokens).logits.double()
    expected_kl = divergence("forward_kl", logits, target).mean(1)
    assert kl.item() == pytest.approx(expected_kl.mean().item(), rel=1e-4)
    plain = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert cross_entropy.item() == pytest.approx(plain.item(), rel=1e-4)
    weighted = kl if alpha is None else 0.7 * intermediate  # α · L_is = L_logits in each row
    assert loss.item() == total.item() == pytest.approx((kl + 0.25 * cross_entropy + weighted).item(), rel=1e-4)
    assert intermediate > 0
    for model in (student, teacher):
        assert not any(module._forward_hooks for module in model.modules())


# --- settings ---


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"logits": "kl"}, "logits: 'kl'"),
        ({"hidden_loss": "l1"}, "hidden_loss: 'l1'"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"cross_entropy": -1.0}, "cross_entropy: -1.0"),
        ({"alpha": -0.5}, "alpha: -0.5"),
        ({"top_k": 10, "logits": "reverse_kl"}, "top_k: 10 with logits: reverse_kl"),
        ({"logits": "none"}, "none without a cross_entropy"),
        ({"logits": "none", "cross_entropy": 1.0, "embedding": True}, "alpha: none"),
        ({"hidden": ("last-2",)}, "hidden: 'last-2' is not a map"),
        ({"attention": ("first:1",)}, "attention: 'first:1' is not a map"),
        ({"mlp_input": ("-1:1",)}, "mlp_input: '-1:1' is not a map"),
    ],
)
def test_invalid_loss_settings_are_refused(values, named):
    with pytest.raises(InputError, match=named):
        Losses(**values)


def test_loss_settings_survive_json():
    losses = Losses(hidden=("last-2:last-2",), attention=("1:1", "2:2"), alpha=0.5)
    assert Losses(**json.loads(json.dumps(asdict(losses)))) == losses


def test_loss_settings_say_which_outputs_of_the_teacher_they_need():
    assert [Losses().needs_teacher, Losses().needs_live_teacher] == [True, False]
    assert not Losses(logits="none", cross_entropy=1.0).needs_teacher
    for changes in ({"hidden": ("1:1",)}, {"embedding": True}, {"attention": ("1:1",)}, {"mlp_input": ("1:1",)}):
        assert Losses(**changes).needs_live_teacher


def test_layer_maps_count_from_the_first_or_the_last_layer():
    assert mapped_layers("last-2:last-2", 32, 16) == (29, 13)  # 29:13 in the paper
    assert mapped_layers("0:last", 32, 16) == (0, 15)
    with pytest.raises(InputError, match="'31:16': the student has no layer 16"):
        mapped_layers("31:16", 32, 16)
    with pytest.raises(InputError, match="'last-32:1': the teacher has no layer last-32"):
        mapped_layers("last-32:1", 32, 16)


def test_default_losses_compare_hidden_states_if_much_depth_is_removed():
    teacher = replace(tiny.architecture(tiny.model()), num_layers=32)
    losses, why = default_losses(replace(teacher, num_layers=16), teacher)
    assert (losses.hidden, losses.embedding) == (("last-2:last-2",), True)
    assert why == "logits, hidden states and embeddings: 16 of 32 layers are removed, more than a third"
    losses, why = default_losses(replace(teacher, num_layers=22, hidden_size=48), teacher)
    assert losses == Losses()
    assert why == "logits alone: 10 of 32 layers are removed, no more than a third"
    losses, _ = default_losses(replace(teacher, num_layers=1), teacher)
    assert losses.hidden == ("last-0:last-0",)

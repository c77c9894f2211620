"""Log-likelihoods of answers that share a context equal those of each answer in a separate row."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from helpers import tiny
from helpers.late_gpu import LateGpu

from minitron.evaluation import batches, continuations
from minitron.evaluation.continuations import Continuation, log_likelihoods


def _questions():
    """Contexts of several lengths with one to five answers, some of which differ in their last token alone."""
    draw = random.Random(4)

    def tokens(count):
        return draw.choices(range(300), k=count)

    asked = []
    for length in (1, 3, 7, 12):
        context = tokens(length)
        shared = tokens(3)
        asked += [Continuation(context, [*shared, token]) for token in tokens(2)]
        asked += [Continuation(context, tokens(count)) for count in (1, 2, 5)]
    asked.append(Continuation(tokens(9), tokens(4)))
    draw.shuffle(asked)
    return asked


def _alone(model, continuation):
    ids = torch.tensor([[*continuation.context, *continuation.tokens]])
    with torch.inference_mode():
        log_p = torch.log_softmax(model(input_ids=ids[:, :-1]).logits[0].double(), -1)[-len(continuation.tokens) :]
    wanted = torch.tensor(continuation.tokens)
    return float(log_p.gather(1, wanted[:, None]).sum()), bool((log_p.argmax(-1) == wanted).all())


IMPLEMENTATIONS = [(family, "eager") for family in tiny.FAMILIES]
IMPLEMENTATIONS += [
    (family, "sdpa") for family in tiny.FAMILIES if family != "gemma2"
]  # which has eager attention alone


@pytest.mark.parametrize(("family", "attention"), IMPLEMENTATIONS)
def test_answers_that_share_a_context_score_like_separate_rows_in_every_family(family, attention):
    model = tiny.model(family)
    model.set_attn_implementation(attention)
    asked = _questions()
    likeliest = int(model(input_ids=torch.tensor([asked[0].context])).logits[0, -1].argmax())
    asked.append(Continuation(asked[0].context, [likeliest]))
    for batch_rows in (1, 3, 100):
        found = dict(log_likelihoods(model, asked, batch_rows))
        assert sorted(found) == list(range(len(asked)))
        for number, continuation in enumerate(asked):
            log_likelihood, greedy = _alone(model, continuation)
            assert found[number].log_likelihood == pytest.approx(log_likelihood, rel=2e-5, abs=2e-5)
            assert found[number].greedy is greedy
    assert found[len(asked) - 1].greedy


def test_with_longrope_an_answer_has_the_factors_of_its_own_length():
    model = tiny.longrope_model(short_length=12)
    asked = _questions()
    lengths = [len(each.context) + len(each.tokens) - 1 for each in asked]
    assert min(lengths) < 12 < max(lengths)
    shared = [Continuation([5] * 40 + each.context, each.tokens) for each in asked]  # all are long
    for answers in (asked, shared):
        for number, found in log_likelihoods(model, answers, 100):
            assert found.log_likelihood == pytest.approx(_alone(model, answers[number])[0], rel=2e-5, abs=2e-5)


def test_on_a_gpu_batches_have_a_number_of_tokens_and_answers_score_the_same(monkeypatch):
    model = tiny.model("llama")
    asked = _questions() + [Continuation([token], [token + 1, token + 2]) for token in range(40)]
    shapes = []
    model.model.register_forward_pre_hook(
        lambda *call: shapes.append(tuple(call[2]["input_ids"].shape)), with_kwargs=True
    )
    eights, passes = dict(log_likelihoods(model, asked, "auto")), len(shapes)
    assert max(rows for rows, _ in shapes) == 8
    shapes.clear()
    on_gpu = partial(batches.rows_of_batch, device=torch.device("cuda"))
    monkeypatch.setattr(batches, "BATCH_TOKENS", 128)
    monkeypatch.setattr(continuations, "rows_of_batch", lambda rows, longest, _: on_gpu(rows, longest))
    by_tokens = dict(log_likelihoods(model, asked, "auto"))
    assert max(rows * length for rows, length in shapes) <= 128
    assert len(shapes) == passes // 2
    for number, answer in eights.items():
        assert by_tokens[number].log_likelihood == pytest.approx(answer.log_likelihood, rel=1e-6, abs=1e-6)
        assert by_tokens[number].greedy is answer.greedy


def test_texts_are_generated_together_as_far_as_their_cache_fits():
    architecture = tiny.architecture(tiny.model())  # 960 bytes a token
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [batches.generated_rows("auto", architecture, 1 << bits, gpu) for bits in (10, 17, 30)] == [64, 34, 1]
    assert batches.generated_rows("auto", architecture, 1 << 16, cpu) == 8
    assert batches.generated_rows(3, architecture, 1 << 16, gpu) == 3


@pytest.mark.parametrize(("family", "attention"), IMPLEMENTATIONS)
def test_a_beginning_that_all_contexts_share_is_computed_once_in_every_family(family, attention):
    model = tiny.model(family, sliding_window=128)
    model.set_attn_implementation(attention)
    examples = random.Random(1).choices(range(300), k=40)
    asked = [Continuation([*examples, *each.context], each.tokens) for each in _questions()]
    shapes = []
    model.model.register_forward_pre_hook(
        lambda *call: shapes.append(tuple(call[2]["input_ids"].shape)), with_kwargs=True
    )
    found = dict(log_likelihoods(model, asked, 3))
    assert shapes[0] == (1, 40)
    assert max(length for _, length in shapes[1:]) < 40
    for number, continuation in enumerate(asked):
        log_likelihood, greedy = _alone(model, continuation)
        assert found[number].log_likelihood == pytest.approx(log_likelihood, rel=2e-5, abs=2e-5)
        assert found[number].greedy is greedy


def test_a_beginning_longer_than_the_sliding_window_is_computed_in_every_row():
    model = tiny.model("mistral", sliding_window=48)
    asked = [Continuation([*range(40), *each.context], each.tokens) for each in _questions()]
    found = dict(log_likelihoods(model, asked, 3))
    for number, continuation in enumerate(asked):
        log_likelihood, _ = _alone(model, continuation)
        assert found[number].log_likelihood == pytest.approx(log_likelihood, rel=2e-5, abs=2e-5)


def test_a_context_is_computed_once(monkeypatch):
    model = tiny.model("llama")
    seen = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **k: seen.append(tuple(k["input_ids"].shape)) or forward(*a, **k)
    )
    asked = [Continuation([1, 2, 3, 4, 5, 6], [token, token]) for token in (7, 8, 9)]
    dict(log_likelihoods(model, asked, 8))
    assert seen == [(1, 6 + 3)]


def test_a_batch_is_begun_before_the_answers_of_the_one_before_are_read():
    model = tiny.model("llama")
    begun = []
    model.model.register_forward_pre_hook(lambda *_: begun.append(1))
    answers = log_likelihoods(model, [Continuation([1, number], [2]) for number in range(3)], 1)
    assert [(next(answers)[0], len(begun)) for _ in range(3)] == [(0, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_on_a_gpu_answers_are_read_when_they_are_there_and_nothing_else_is_waited_for(family, shared, monkeypatch):
    model = tiny.model(family, sliding_window=128)
    beginning = random.Random(1).choices(range(300), k=shared)
    asked = [Continuation([*beginning, *each.context], each.tokens) for each in _questions()]
    expected = dict(log_likelihoods(model, asked, 3))
    gpu = LateGpu(monkeypatch)
    gpu.hold(model)
    with gpu.computing():
        found = dict(log_likelihoods(model, asked, 3))
    for number, answer in expected.items():
        assert found[number].log_likelihood == pytest.approx(answer.log_likelihood, rel=1e-6)
        assert found[number].greedy is answer.greedy

"""Texts that a model writes."""

from __future__ import annotations

import pytest
import torch
from helpers.evaluating import byte_tokenizer, tiny_model

from minitron.errors import InputError
from minitron.evaluation.generation import Sampling, answer, complete

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def model():
    return tiny_model(3)


def by_argmax(model, tokenizer, text, count):
    """The most probable tokens one after the other, without a cache."""
    ids = tokenizer.encode(text)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[-count:], skip_special_tokens=True)


def test_a_completion_takes_the_most_probable_tokens_and_changes_nothing(model):
    tokenizer = byte_tokenizer()
    model.train()
    before = torch.get_rng_state()
    text = complete(model, tokenizer, "the river", Sampling(max_new_tokens=12))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert text == by_argmax(model, tokenizer, "the river", 12)
    drawn = [complete(model, tokenizer, "the river", Sampling(12, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_is_written_with_the_tokenizers_own_template(model):
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(InputError, match="no chat template"):
        answer(model, tokenizer, messages)
    tokenizer.chat_template = TEMPLATE
    assert answer(model, tokenizer, messages, Sampling(5)) == by_argmax(model, tokenizer, "[user]hello[assistant]", 5)


def test_a_prompt_beyond_the_context_is_refused(model):
    with pytest.raises(InputError, match="the prompt has 500 tokens, which with 128 new ones are more than the 512"):
        complete(model, byte_tokenizer(), "a" * 500)

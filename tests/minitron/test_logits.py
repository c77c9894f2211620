"""Slices of logits are processed in memory that is taken once, because the C library splits freed memory of their size."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.data import DocumentTokens
from minitron.distill.teacher.stored import log_sum_exp
from minitron.distill.teacher.top_k import top_tokens
from minitron.evaluation.beginning import bos_losses
from minitron.evaluation.continuations import Continuation, log_likelihoods
from minitron.evaluation.heldout import heldout_metrics, teacher_targets
from minitron.importance.removal import removal_scores
from minitron.logits import CACHE_ROWS, Head, logsumexp
from minitron.models import final_hidden

VOCABULARY, ROWS, TOKENS = 50_000, 2, 200
SLICES = ROWS * TOKENS // CACHE_ROWS


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).bfloat16().eval()


def _stored(model, rows):
    log_sum_exp(Head.of(model), final_hidden(model, rows))


def _heldout(model, rows):
    heldout_metrics(model, rows, **teacher_targets(model, rows))


def _continuations(model, rows):
    asked = [Continuation(row[:1].tolist(), row[1:].tolist()) for row in rows]
    assert len(list(log_likelihoods(model, asked, ROWS))) == ROWS


def _top_tokens(model, rows):
    top_tokens(Head.of(model), final_hidden(model, rows).flatten(0, 1), 8)


def _bos(model, rows):
    bos_losses(model, rows[:1], DocumentTokens(begin=(), end=(1,), bos=2))


def _removal(metric):
    def scores(model, rows):
        removal_scores(model, rows, metric, [0, 1], [1], documents=None, batch_rows=ROWS, advance=lambda count: None)

    return scores


@pytest.mark.parametrize(
    ("compute", "most"),
    [
        pytest.param(_stored, 1, id="stored"),
        pytest.param(_heldout, 3, id="heldout"),
        pytest.param(_continuations, 1, id="continuations"),
        pytest.param(_removal("loss"), 4, id="loss"),  # two for each of the two layers
        pytest.param(_removal("logit_error"), 5, id="logit_error"),  # once for the scale, and two for each layer
        pytest.param(_top_tokens, 2, id="top_tokens"),  # logits, and memory for a slice
        pytest.param(_bos, 4, id="bos"),  # these of two texts
    ],
)
@torch.no_grad()
def test_memory_for_logits_is_not_taken_again_for_every_slice(model, compute, most):
    rows = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        compute(model, rows)
    slice_bytes = 4 * CACHE_ROWS * VOCABULARY
    large = [event.name for event in profiled.events() if event.self_cpu_memory_usage >= slice_bytes]
    assert 1 <= len(large) <= most < SLICES


@pytest.mark.parametrize("inside", [0.0, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("in_place", [False, True])
def test_logsumexp_equals_that_of_torch_bit_for_bit(inside, in_place):
    logits = 30 * torch.randn(CACHE_ROWS, 10_007, generator=torch.Generator().manual_seed(0))
    logits[1, 5] = inside
    logits[2] = inside
    expected = torch.logsumexp(logits, dim=-1)
    found = logsumexp(logits, out=logits if in_place else torch.empty_like(logits))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))

"""A model's loss on the same text with and without a beginning-of-sequence token (BOS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron.data import DocumentTokens
from minitron.evaluation.mode import evaluating
from minitron.logits import CHUNK_TOKENS, Head, cache_buffer, log_softmax_slices_, tokens_per_chunk
from minitron.models import final_hidden


@dataclass(frozen=True)
class BosLosses:
    """Next-token cross-entropies, nats per token, means over the same `tokens` of text."""

    with_bos: float
    without_bos: float
    tokens: int


def bos_losses(model: Any, rows: Tensor, around: DocumentTokens) -> BosLosses | None:
    """The loss of `model` on `rows`, int64 [num_rows, seq_length], once with BOS and once without.

    rows: packed by `minitron.data.pack` with the special tokens `around`. With BOS, the tokens `around.begin` (the tokenizer's
    BOS if that is empty) precede every document and start every row. Returns None if the tokenizer has no such token.

    Both losses are means over the same tokens: text only, without the first token of a row, which has no context in the rows
    without BOS. If the rows were packed without BOS, they are cut at the end to make room for it.
    """
    if not around.begin and around.bos is None:
        return None
    begin = around.chosen(add_bos=True).begin
    head = Head.of(model)
    totals = [0.0, 0.0]  # with BOS, without
    tokens = 0
    with torch.inference_mode(), evaluating(model):
        for row in rows.tolist():
            texts = _fitting(_texts(row, around), len(row), len(begin))
            for index, before in enumerate((begin, ())):
                losses = _losses(model, head, texts, before)
                totals[index] += float(losses.sum())
            tokens += len(losses)
    return BosLosses(totals[0] / tokens, totals[1] / tokens, tokens)


def _texts(row: list[int], around: DocumentTokens) -> list[list[int]]:
    """The documents of a row, or the parts of them that are in it, with their end tokens and without their begin tokens."""
    texts: list[list[int]] = [[]]
    position = len(around.begin)
    while position < len(row):
        texts[-1].append(row[position])
        position += 1
        if texts[-1][-len(around.end) :] == list(around.end):
            texts.append([])
            if around.begins(row[position:]):
                position += len(around.begin)
    return [text for text in texts if text]


def _fitting(texts: list[list[int]], length: int, before: int) -> list[list[int]]:
    """The first texts that fit into `length` tokens if `before` tokens precede each; the last one may be truncated."""
    fitting = []
    for text in texts:
        if length > before:
            fitting.append(text[: length - before])
        length -= before + len(text)
    return fitting


def _losses(model: Any, head: Head, texts: list[list[int]], begin: Sequence[int]) -> Tensor:
    """Cross-entropy, nats, of every token of the texts except the first, with `begin` before each text: float64 [n]."""
    ids = [token for text in texts for token in (*begin, *text)]
    counts = [is_text for text in texts for is_text in (*[False] * len(begin), *[True] * len(text))]
    counts[len(begin)] = False
    targets = torch.tensor(ids[1:], device=head.weight.device)
    predicted = torch.tensor(counts[1:], device=head.weight.device)
    hidden = final_hidden(model, torch.tensor([ids], device=head.weight.device))[0, :-1][predicted]
    parts = zip(head.chunks(hidden), targets[predicted].split(tokens_per_chunk(head.weight, CHUNK_TOKENS)), strict=True)
    buffer = cache_buffer(head.weight)
    log_probs = [log_softmax_slices_(logits, buffer).gather(1, target[:, None])[:, 0] for logits, target in parts]
    return -torch.cat(log_probs).double()

"""What the beginning-of-sequence token is worth to a model: its loss on the same text with it and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron.data import DocumentTokens
from minitron.evaluation.mode import evaluating
from minitron.logits import CHUNK_TOKENS, Head, log_softmax_, tokens_per_chunk
from minitron.models import final_hidden


@dataclass(frozen=True)
class BosLosses:
    """Next-token cross-entropies, nats per token, means over the same `tokens` of text."""

    with_bos: float
    without_bos: float
    tokens: int


def bos_losses(model: Any, rows: Tensor, around: DocumentTokens) -> BosLosses | None:
    """The loss of `model` on `rows`, int64 [num_rows, seq_length] as `minitron.data.pack` packs them with `around`: once with
    its beginning, or else BOS, before every document and at the row's start, and once without. None where there is neither.

    Both times the same tokens count: not those that only one of the two has, and not the first of a row's text, which one of
    the two gives nothing to be predicted from. Where the rows have no beginnings, the end of each makes room for them.
    """
    if not around.begin and around.bos is None:
        return None
    begin = around.chosen(add_bos=True).begin
    head = Head.of(model)
    totals, tokens = [0.0, 0.0], 0
    with torch.inference_mode(), evaluating(model):
        for row in rows.tolist():
            texts = _fitting(_texts(row, around), len(row), len(begin))
            for place, before in enumerate((begin, ())):
                losses = _losses(model, head, texts, before)
                totals[place] += float(losses.sum())
            tokens += len(losses)
    return BosLosses(totals[0] / tokens, totals[1] / tokens, tokens)


def _texts(row: list[int], around: DocumentTokens) -> list[list[int]]:
    """A row's documents, or the parts of them that it has: each with its end, without its beginning."""
    texts: list[list[int]] = [[]]
    place = len(around.begin)
    while place < len(row):
        texts[-1].append(row[place])
        place += 1
        if texts[-1][-len(around.end) :] == list(around.end):
            texts.append([])
            if around.begins(row[place:]):
                place += len(around.begin)
    return [text for text in texts if text]


def _fitting(texts: list[list[int]], length: int, before: int) -> list[list[int]]:
    """As much of the texts as fits into `length` tokens with `before` tokens in front of each."""
    fitting = []
    for text in texts:
        if length > before:
            fitting.append(text[: length - before])
        length -= before + len(text)
    return fitting


def _losses(model: Any, head: Head, texts: list[list[int]], begin: Sequence[int]) -> Tensor:
    """float64 [n], of every token of the texts but the first, each text preceded by `begin`."""
    ids = [token for text in texts for token in (*begin, *text)]
    counts = [is_text for text in texts for is_text in (*[False] * len(begin), *[True] * len(text))]
    counts[len(begin)] = False
    targets = torch.tensor(ids[1:], device=head.weight.device)
    predicted = torch.tensor(counts[1:], device=head.weight.device)
    hidden = final_hidden(model, torch.tensor([ids], device=head.weight.device))[0, :-1][predicted]
    parts = zip(head.chunks(hidden), targets[predicted].split(tokens_per_chunk(head.weight, CHUNK_TOKENS)), strict=True)
    return torch.cat([-log_softmax_(logits).gather(1, wanted[:, None])[:, 0].double() for logits, wanted in parts])

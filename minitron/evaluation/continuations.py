"""Log-likelihoods of continuations, each context computed once.

The answers to a multiple-choice question follow the same context: they lie in one row behind it, as branches that see the
context and themselves but not each other, at the positions that they have behind the context alone. That is the same
arithmetic as a row for each answer, without computing the context for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minitron.attention import takes_masks
from minitron.logits import CHUNK_TOKENS, Head, log_softmax_, tokens_per_chunk
from minitron.models import decoder_and_head

MASK_BYTES = 256 << 20  # of a batch's attention mask, float32 [rows, 1, length, length]


@dataclass(frozen=True)
class Continuation:
    """Token ids of a text whose likelihood is asked for, and of what precedes it (at least one)."""

    context: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Answer:
    """Sum of the tokens' log-probabilities, nats; and whether each is the likeliest at its position."""

    log_likelihood: float
    greedy: bool


@dataclass
class _Row:
    """A context and the inputs of what follows it, by the numbers of the continuations that read them."""

    context: tuple[int, ...]
    branches: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.branches))

    def ids(self) -> list[int]:
        return [*self.context, *(token for branch in self.branches for token in branch)]

    def positions(self) -> list[int]:
        behind = len(self.context)
        return [*range(behind), *(behind + i for branch in self.branches for i in range(len(branch)))]

    def visible(self, length: int) -> Tensor:
        """bool [length, length]: which positions (columns) each one (rows) sees. Padding sees itself."""
        seen = torch.eye(length, dtype=torch.bool)
        behind = start = len(self.context)
        seen[:behind, :behind] = torch.ones(behind, behind, dtype=torch.bool).tril()
        for branch in self.branches:
            own = slice(start, start + len(branch))
            seen[own, :behind] = True
            seen[own, own] = torch.ones(len(branch), len(branch), dtype=torch.bool).tril()
            start += len(branch)
        return seen

    def reading(self) -> Iterator[tuple[int, list[int]]]:
        """(continuation, the positions in the row whose outputs predict its tokens)."""
        start = len(self.context)
        for branch, numbers in self.branches.items():
            for number in numbers:
                yield number, [len(self.context) - 1, *range(start, start + len(branch))]
            start += len(branch)


def log_likelihoods(model: Any, asked: Sequence[Continuation], batch_rows: int) -> Iterator[tuple[int, Answer]]:
    """(number in `asked`, answer) for each continuation, longest rows first; logits accumulate in float32.

    Continuations behind the same context share its row where the model's attention takes a mask and has no window shorter
    than they are. At most `batch_rows` rows, and MASK_BYTES of masks, at a time.
    """
    decoder, _ = decoder_and_head(model)
    head = Head.of(model)
    rows = sorted(_rows(asked, model.config), key=len, reverse=True)
    for several in (True, False):  # apart, because rows without a mask may be longer than a window
        alike = [row for row in rows if (len(row.branches) > 1) is several]
        while alike:
            longest = len(alike[0])
            count = min(batch_rows, max(1, MASK_BYTES // (4 * longest**2))) if several else batch_rows
            batch, alike = alike[:count], alike[count:]
            with torch.inference_mode():
                hidden = _hidden(decoder, batch, longest, head.weight, masked=several)
                yield from _batch_answers(hidden, batch, asked, head)


def _rows(asked: Sequence[Continuation], config: Any) -> list[_Row]:
    shared: dict[tuple[int, ...], _Row] = {}
    for number, continuation in enumerate(asked):
        context = tuple(continuation.context)
        row = shared.setdefault(context, _Row(context))
        row.branches.setdefault(tuple(continuation.tokens[:-1]), []).append(number)
    masked = takes_masks(config)
    window = getattr(config, "sliding_window", None) or float("inf")

    def fits(row: _Row) -> bool:
        return len(row.branches) == 1 or (masked and max(row.positions()) < window)

    return [
        part
        for row in shared.values()
        for part in ([row] if fits(row) else [_Row(row.context, {b: n}) for b, n in row.branches.items()])
    ]


def _hidden(decoder: Any, batch: list[_Row], length: int, weight: Tensor, *, masked: bool) -> Tensor:
    """Final hidden states of the rows, [len(batch), length, hidden], padded on the right."""
    padded = [row.ids() + [0] * (length - len(row)) for row in batch]
    ids = torch.tensor(padded, device=weight.device)
    if not masked:  # causal attention sees nothing of what pads a row behind it
        return decoder(input_ids=ids, use_cache=False).last_hidden_state
    visible = torch.stack([row.visible(length) for row in batch])[:, None].to(weight.device)
    mask = torch.zeros(visible.shape, dtype=weight.dtype, device=weight.device)
    mask.masked_fill_(~visible, torch.finfo(weight.dtype).min)
    positions = torch.tensor([row.positions() + [0] * (length - len(row)) for row in batch], device=weight.device)
    return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


def _batch_answers(
    hidden: Tensor, batch: list[_Row], asked: Sequence[Continuation], head: Head
) -> Iterator[tuple[int, Answer]]:
    numbers, places, targets = [], [], []
    for index, row in enumerate(batch):
        for number, positions in row.reading():
            numbers.append(number)
            places += [(index, position) for position in positions]
            targets += asked[number].tokens
    which, where = torch.tensor(places, device=hidden.device).T
    wanted = torch.tensor(targets, device=hidden.device)
    read, step = hidden[which, where], tokens_per_chunk(head.weight, CHUNK_TOKENS)
    log_p, best = [], []
    for part, tokens in zip(read.split(step), wanted.split(step), strict=True):
        logits = log_softmax_(head.logits(part))
        log_p.append(logits.gather(1, tokens[:, None])[:, 0].double())
        best.append(logits.argmax(-1) == tokens)
    sizes = [len(asked[number].tokens) for number in numbers]
    parts = zip(numbers, torch.cat(log_p).split(sizes), torch.cat(best).split(sizes), strict=True)
    for number, values, hits in parts:
        yield number, Answer(float(values.sum()), bool(hits.all()))

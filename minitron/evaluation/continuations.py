"""Log-likelihoods of continuations that share contexts, with every context computed once.

The answers to a multiple-choice question follow the same context. They are concatenated after it in one row, as branches that
attend to the context and to themselves but not to each other; each has the position ids that it would have directly after
the context. What all contexts begin with is computed once for all rows. The result is the same as with one row per answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from minitron.architecture import Architecture
from minitron.attention import row_arguments, short_length, takes_masks, use_own_attention
from minitron.config_values import declared
from minitron.evaluation.answers import Answers, batch_name
from minitron.evaluation.batches import BatchRows, prefixed_rows, rows_of_batch
from minitron.evaluation.shared_prefix import SharedPrefix, shared_length
from minitron.kv_cache import with_cache
from minitron.logits import Head, cache_slices, logsumexp
from minitron.models import decoder_and_head
from minitron.processes import all_rows, all_succeed, check_same, dealt

Item = TypeVar("Item")

MASK_BYTES = 256 << 20  # largest attention mask of a batch, float32 [rows, 1, length, length]


@dataclass(frozen=True)
class Continuation:
    """Token ids of a text to score, and of the context before it (at least one token)."""

    context: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Answer:
    """The score of a continuation: the sum of its tokens' log-probabilities in nats, and whether greedy decoding yields it."""

    log_likelihood: float
    greedy: bool


@dataclass
class _Row:
    """A context, without the prefix that it shares with all others, and its continuations."""

    context: tuple[int, ...]
    branches: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    """Input tokens after the context (a continuation without its last token) -> indices of the continuations with them."""
    before: int = 0
    """Number of tokens of the shared prefix."""
    is_long: bool = False
    """Whether it is longer than `short_length` of the model; such rows share neither batches nor a prefix with others."""

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.branches))

    def ids(self) -> list[int]:
        return [*self.context, *(token for branch in self.branches for token in branch)]

    def positions(self) -> list[int]:
        first = self.before + len(self.context)
        return [*range(self.before, first), *(first + i for branch in self.branches for i in range(len(branch)))]

    def visible(self, length: int) -> Tensor:
        """bool [length, before + length]: which positions (columns), after those of the prefix, each query position (rows)
        attends to. Padding attends to itself."""
        prefixed = torch.zeros(length, self.before + length, dtype=torch.bool)
        prefixed[: len(self), : self.before] = True
        mask = prefixed[:, self.before :]
        mask.fill_diagonal_(True)
        context = len(self.context)
        mask[:context, :context] = torch.ones(context, context, dtype=torch.bool).tril()
        start = context
        for branch in self.branches:
            own = slice(start, start + len(branch))
            mask[own, :context] = True
            mask[own, own] = torch.ones(len(branch), len(branch), dtype=torch.bool).tril()
            start += len(branch)
        return prefixed

    def without(self, prefix: int) -> _Row:
        """The same row, of which the first `prefix` tokens are computed before."""
        return _Row(self.context[prefix:], self.branches, prefix)

    def outputs(self) -> Iterator[tuple[int, list[int]]]:
        """(index of a continuation, the positions in the row whose outputs predict its tokens)."""
        start = len(self.context)
        for branch, numbers in self.branches.items():
            for number in numbers:
                yield number, [len(self.context) - 1, *range(start, start + len(branch))]
            start += len(branch)


def log_likelihoods(
    model: Any,
    continuations: Sequence[Continuation],
    batch_rows: BatchRows,
    *,
    together: bool = False,
    stored: Answers | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index in `continuations`, answer) for each continuation, longest rows first; logits are accumulated in float32.

    Continuations of the same context share a row, and all rows the beginning of their contexts, if the model's attention
    implementation accepts a mask and its sliding window is at least as long. A batch has at most `batch_rows` rows (see
    `minitron.evaluation.batches`) and MASK_BYTES of attention mask. Padding, other rows and a shared beginning change a result
    by rounding at most. together: all processes of torch.distributed call this alike and share the batches, which are those of
    one process; each yields its own answers first and then those of the others. stored: kept answers, which are not computed
    again, and where new ones are kept.
    """
    decoder, _ = decoder_and_head(model)
    use_own_attention(model.config)  # in batches with and without a mask alike
    head = Head.of(model)
    own: list[tuple[int, Answer]] = []
    check_same("the requests", _content(continuations), together)
    with all_succeed(together):
        batches = []
        for each in _batches(continuations, model.config, batch_rows, head.weight.device):
            if stored is None or (values := stored.known.get(_name(each[0], continuations))) is None:
                batches.append(each)
            else:
                numbers = [number for row in each[0] for number, _ in row.outputs()]
                yield from ((n, Answer(float(v[0]), bool(v[1]))) for n, v in zip(numbers, values, strict=True))
        prefix = _prefix(decoder, batches, continuations, head.weight.device)

        def computed() -> Iterator[tuple[list[_Row], _BatchAnswers]]:
            for (batch, masked), counts in dealt(batches, model, together=together):
                with torch.inference_mode():
                    hidden = _hidden(decoder, batch, head.weight, prefix, masked=masked)
                    answers = _BatchAnswers.begun(hidden, batch, continuations, head)
                if counts:
                    yield batch, answers

        for batch, pending in _one_ahead(computed()):
            answers = pending.wait()
            own += answers
            if stored is not None:
                kept = [[answer.log_likelihood, answer.greedy] for _, answer in answers]
                stored.add(_name(batch, continuations), kept)
            yield from answers
    own_values = [[number, answer.log_likelihood, answer.greedy] for number, answer in own]
    mine = {number for number, _ in own}
    for number, log_likelihood, greedy in all_rows(
        torch.tensor(own_values, dtype=torch.float64).view(-1, 3), together
    ).tolist():
        if int(number) not in mine:
            yield int(number), Answer(log_likelihood, bool(greedy))


def _content(continuations: Sequence[Continuation]) -> Iterator[bytes]:
    """Equal for equal continuations."""
    return (array("q", [-1, *each.context, -1, *each.tokens]).tobytes() for each in continuations)


def _name(batch: list[_Row], continuations: Sequence[Continuation]) -> str:
    """Name of a batch by its requests, and by the length of a prefix, which changes the rounding."""
    own = [continuations[number] for row in batch for number, _ in row.outputs()]
    prefix = [str(batch[0].before).encode()] if batch[0].before else []
    return batch_name([*prefix, *_content(own)])


def _batches(
    continuations: Sequence[Continuation], config: Any, batch_rows: BatchRows, device: torch.device
) -> list[tuple[list[_Row], bool]]:
    """(rows of a batch, the longest first; whether they need a mask)."""
    rows = sorted(_rows(continuations, config), key=len, reverse=True)
    before = rows[0].before if rows else 0
    most = prefixed_rows(batch_rows, Architecture.from_config(config), before, device) if before else len(rows)
    batches = []
    # in separate batches, because rows without a mask may be longer than the sliding window
    for several, is_long in product((True, False), (True, False)):
        alike = [row for row in rows if (len(row.branches) > 1, row.is_long) == (several, is_long)]
        masked = several or before > 0
        while alike:
            longest = len(alike[0])
            count = min(most, rows_of_batch(batch_rows, longest, device))
            if masked:
                count = min(count, max(1, MASK_BYTES // (4 * longest * (before + longest))))
            batches.append((alike[:count], masked))
            alike = alike[count:]
    return batches


def _rows(continuations: Sequence[Continuation], config: Any) -> list[_Row]:
    shared: dict[tuple[tuple[int, ...], bool], _Row] = {}
    most = short_length(config)
    for number, continuation in enumerate(continuations):
        context = tuple(continuation.context)
        is_long = most is not None and len(context) + len(continuation.tokens) - 1 > most
        row = shared.setdefault((context, is_long), _Row(context, is_long=is_long))
        row.branches.setdefault(tuple(continuation.tokens[:-1]), []).append(number)
    window = (declared(config, "sliding_window") or float("inf")) if takes_masks(config) else 0

    def fits(row: _Row) -> bool:
        return max(row.positions()) < window

    may_share = all(fits(row) and not row.is_long for row in shared.values())
    if may_share and (prefix := shared_length([row.context for row in shared.values()])):
        return [row.without(prefix) for row in shared.values()]
    return [
        part
        for row in shared.values()
        for part in (
            [row]
            if len(row.branches) == 1 or fits(row)
            else [_Row(row.context, {b: n}, is_long=row.is_long) for b, n in row.branches.items()]
        )
    ]


def _prefix(
    decoder: Any,
    batches: Sequence[tuple[list[_Row], bool]],
    continuations: Sequence[Continuation],
    device: torch.device,
) -> SharedPrefix | None:
    """What the rows of all batches share, if they do."""
    if not batches or not (before := batches[0][0][0].before):
        return None
    with torch.inference_mode():
        return SharedPrefix.computed(decoder, continuations[0].context[:before], device)


def _hidden(decoder: Any, batch: list[_Row], weight: Tensor, prefix: SharedPrefix | None, *, masked: bool) -> Tensor:
    """Final hidden states of the rows, the longest of which is the first, [len(batch), its length, hidden], in the model's
    dtype; rows are padded on the right."""
    length = len(batch[0])
    padded = [row.ids() + [0] * (length - len(row)) for row in batch]
    ids = _sent(torch.tensor(padded), weight.device)
    if not masked:  # causal attention ignores the padding on the right
        causal = row_arguments(decoder, ids, kernel="dense")  # flex_attention would be compiled for every length
        return decoder(input_ids=ids, use_cache=False, **causal).last_hidden_state
    visible = _sent(torch.stack([row.visible(length) for row in batch])[:, None], weight.device)
    mask = torch.zeros(visible.shape, dtype=weight.dtype, device=weight.device)
    mask.masked_fill_(~visible, torch.finfo(weight.dtype).min)
    positions = _sent(torch.tensor([row.positions() + [0] * (length - len(row)) for row in batch]), weight.device)
    cached = {"use_cache": False} if prefix is None else with_cache(prefix.cache(len(batch)))
    return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, **cached).last_hidden_state


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; a GPU copies it when it gets there, without making this process wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each after the next one was begun: a GPU has work while this process reads the results of a batch."""
    before: list[Item] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


@dataclass(frozen=True)
class _BatchAnswers:
    """The answers of a batch, which a GPU may not have computed yet."""

    numbers: list[int]
    """Numbers of the continuations."""
    sizes: list[int]
    """Their numbers of tokens."""
    log_probs: Tensor = field(repr=False)
    """float64 [sum of sizes], on the CPU."""
    is_top: Tensor = field(repr=False)
    """bool [sum of sizes], on the CPU."""
    ready: torch.cuda.Event | None
    """None if the tensors are complete."""

    @classmethod
    def begun(
        cls, hidden: Tensor, batch: list[_Row], continuations: Sequence[Continuation], head: Head
    ) -> _BatchAnswers:
        numbers: list[int] = []
        rows: list[int] = []
        positions: list[int] = []  # with `rows`: every output that is needed
        tokens: list[int] = []
        for index, row in enumerate(batch):
            for number, outputs in row.outputs():
                numbers.append(number)
                rows += [index] * len(outputs)
                positions += outputs
                tokens += continuations[number].tokens
        row_index, position_index, targets = _sent(torch.tensor([rows, positions, tokens]), hidden.device)
        log_probs: list[Tensor] = []
        is_top: list[Tensor] = []
        start = 0
        for logits in head.chunks(hidden[row_index, position_index]):
            for part in cache_slices(logits):
                values, target = logits[part], targets[start:][part]
                is_top.append(values.argmax(-1) == target)
                chosen = values.gather(1, target[:, None])[:, 0]
                log_probs.append((chosen - logsumexp(values, out=values)).double())
            start += len(logits)
        sizes = [len(continuations[number].tokens) for number in numbers]
        # one copy for the whole batch, into pinned memory
        copies = [torch.cat(each).to("cpu", non_blocking=hidden.is_cuda) for each in (log_probs, is_top)]
        ready = None
        if hidden.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(hidden.device))
        return cls(numbers, sizes, copies[0], copies[1], ready)

    def wait(self) -> list[tuple[int, Answer]]:
        """(index of a continuation, its answer), when they are known."""
        if self.ready is not None:
            self.ready.synchronize()
        values, tops = self.log_probs.split(self.sizes), self.is_top.split(self.sizes)
        return [
            (number, Answer(float(value.sum()), bool(top.all())))
            for number, value, top in zip(self.numbers, values, tops, strict=True)
        ]
